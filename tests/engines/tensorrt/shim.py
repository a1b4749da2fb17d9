"""The real TensorRT Python bindings on a CPU, without TensorRT's own 2 GB of libraries.

The bindings need ten C symbols. The lean runtime's library has three of them, the plugin registry
among them; a few lines of C supply the rest: a builder and a parser that are not there. What can be
reached so is the registry, the plugins' Python layer, and all classes; what cannot is a build.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LEAN, BINDINGS = "tensorrt-lean-cu13-libs", "tensorrt-cu13-bindings"
_MAJOR = "11"
_SOURCES = {
    "nvinfer": """
        extern void *getPluginRegistry(void);
        void *getBuilderPluginRegistry(int capability) {
            (void)capability;
            return getPluginRegistry();
        }
        void *createInferBuilder_INTERNAL(void *logger, int version) {
            (void)logger, (void)version;
            return 0;
        }
    """,
    "nvinfer_plugin": """
        int initLibNvInferPlugins(void *logger, const char *name) {
            (void)logger, (void)name;
            return 1;
        }
    """,
    "nvonnxparser": """
        void *createNvOnnxParser_INTERNAL(void *network, void *logger, int version) {
            (void)network, (void)logger, (void)version;
            return 0;
        }
        void *createNvOnnxParserRefitter_INTERNAL(void *refitter, void *logger, int version) {
            (void)refitter, (void)logger, (void)version;
            return 0;
        }
        int getNvOnnxParserVersion(void) { return 110400; }
    """,
}


@dataclass(frozen=True)
class Parts:
    """What the shim is made of."""

    lean: Path
    compiler: str


def parts() -> Parts | str:
    """What is there, or what is missing, in words."""
    if importlib.util.find_spec("tensorrt_bindings") is None:
        return f"the wheel {BINDINGS} is not installed (pip install -e '.[dev]' on Linux x86-64)"
    try:
        files = importlib.metadata.files(LEAN) or []
    except importlib.metadata.PackageNotFoundError:
        return f"the wheel {LEAN} is not installed (pip install -e '.[dev]' on Linux x86-64)"
    name = f"libnvinfer_lean.so.{_MAJOR}"
    found = [Path(str(file.locate())) for file in files if file.name == name]
    if not found:
        return f"{LEAN} has no {name}"
    compiler = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if compiler is None:
        return "no C compiler is installed"
    return Parts(found[0], compiler)


def build(found: Parts, folder: Path) -> list[Path]:
    """Compile the three stand-in libraries; in the order in which they must be loaded."""
    made = []
    for name, text in _SOURCES.items():
        source, library = folder / f"{name}.c", folder / f"lib{name}.so.{_MAJOR}"
        source.write_text(text)
        soname = f"-Wl,-soname,{library.name}"
        command = [found.compiler, "-shared", "-fPIC", soname, "-o", str(library), str(source)]
        if name == "nvinfer":
            command += [str(found.lean), f"-Wl,-rpath,{found.lean.parent}"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        made.append(library)
    return made


@contextmanager
def installed(found: Parts, folder: Path) -> Iterator[Any]:
    """The bindings as `tensorrt`, over stand-in libraries made in `folder`."""
    for library in (found.lean, *build(found, folder)):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    bindings = importlib.import_module("tensorrt_bindings")
    kept = {name: module for name, module in sys.modules.items() if _is_tensorrt(name)}
    for name in kept:
        del sys.modules[name]
    sys.modules["tensorrt"] = bindings
    try:
        yield bindings
    finally:
        for name in [name for name in sys.modules if _is_tensorrt(name)]:
            del sys.modules[name]
        sys.modules.update(kept)


def _is_tensorrt(name: str) -> bool:
    return name == "tensorrt" or name.startswith("tensorrt.")
