"""Libraries in the place of cuBLAS and cuDNN, for a TensorRT 8.6 that calls neither."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

from qdit.errors import InputError


def make_stand_ins(library: Path, folder: Path) -> None:
    """Libraries that export the cuBLAS and cuDNN symbols which `library` binds: every one fails."""
    folder.mkdir(parents=True, exist_ok=True)
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise InputError("stand-ins need a C compiler (cc or gcc), and there is none; install one")
    if shutil.which("nm") is None:
        raise InputError("stand-ins need nm, which binutils has; install them")
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    )
    wanted: dict[str, list[str]] = defaultdict(list)
    pattern = r"U (\w+)@+(lib(?:cublas|cublasLt|cudnn)\.so\.\d+)"
    for name, soname in re.findall(pattern, listed.stdout):
        wanted[soname].append(name)
    for soname, names in wanted.items():
        source, versions = folder / f"{soname}.c", folder / f"{soname}.map"
        source.write_text("".join(f"int {name}(void) {{ return 1; }}\n" for name in names))
        versions.write_text(f"{soname} {{ global: {'; '.join(names)}; local: *; }};\n")
        options = ["-shared", "-fPIC", f"-Wl,-soname,{soname}", f"-Wl,--version-script={versions}"]
        subprocess.run([compiler, *options, "-o", folder / soname, source], check=True)
