"""The C sources as a shared library, compiled when it is first wanted and then kept.

A compilation takes seconds. Its result lies in the user's cache, named by a digest of sources,
flags and system and by one of the compiler, so that it is made again when any of them changes.
"""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from ...errors import InputError
from ...files import atomic_path, cache_folder
from .compiler import Compiler, find_compiler

Products = Literal["fast", "plain", "emulated"]

SOURCES = Path(__file__).parent / "c"
NO_COMPILER = "no C compiler; install one, or qdit[cpu], which brings one"
_PLAIN = "plain.c"
_OPERATOR = ("custom_op.c", "node.c")
# No -march: functions say themselves which instructions they use, so that asking what there is
# runs on any machine. Sums and products are rounded one by one, as in the simulation.
FLAGS = (
    "-std=c11",
    "-O3",
    "-ffp-contract=off",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-Wl,-z,defs",
)
_LIBRARIES = ("-lm", "-pthread")
# The matrix unit's tiles in plain C: the path of AMX on a machine without it, for tests.
_DEFINES: dict[Products, tuple[str, ...]] = {"emulated": ("-DQDIT_EMULATED_TILES",)}


def build_library(products: Products = "fast") -> Path:
    """The operator's library, with the products of that kind; 'plain' and 'emulated' are for tests.

    Without a compiler, a library that another one made of the same sources will do. Raises
    `InputError` where there is neither, or `$CC` names nothing, and `StepError` with the
    compiler's log where it fails.
    """
    sources = source_files(products)
    name = f"{products}-{_digest(_parts(sources))}"
    compiler = find_compiler()
    folder = cache_folder("cpu_kernels")
    if compiler is None:
        kept = sorted(folder.glob(f"{name}-*.so"))
        if not kept:
            raise InputError(NO_COMPILER)
        return kept[0]
    identity = (*compiler.command, *compiler.options, compiler.version())
    path = folder / f"{name}-{_digest(part.encode() for part in identity)}.so"
    if not path.is_file():
        _compile(compiler, [*_DEFINES.get(products, ()), *map(str, sources)], path)
    return path


def source_files(products: Products) -> list[Path]:
    """The operator's C files and those of its products: `plain.c`, or all others."""
    found = sorted(path for path in SOURCES.glob("*.c"))
    wanted = {_PLAIN, *_OPERATOR}
    if products == "plain":
        return [path for path in found if path.name in wanted]
    return [path for path in found if path.name != _PLAIN]


def _parts(sources: Iterable[Path]) -> Iterable[bytes]:
    yield from (sys.platform.encode(), platform.machine().encode())
    yield from (flag.encode() for flag in (*FLAGS, *_LIBRARIES))
    for path in [*sources, *sorted(SOURCES.glob("*.h"))]:
        yield from (path.name.encode(), path.read_bytes())


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:24]


def _compile(compiler: Compiler, inputs: Iterable[str], path: Path) -> None:
    with atomic_path(path) as fresh, TemporaryDirectory(prefix="qdit-cc-") as scratch:
        compiler.compile([*FLAGS, "-o", str(fresh), *inputs, *_LIBRARIES], Path(scratch))
