"""Compile a kernel with NVRTC: for any architecture, on machines without a GPU as well.

A variant takes a fraction of a second, so it is compiled when it is first wanted, and then kept in
the user's cache under a digest of all that it follows from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ...errors import InputError, StepError
from ...files import atomic_path, cache_folder
from .sources import headers, source, wgmma_header

Form = Literal["cubin", "ptx"]
Defines = Mapping[str, int]

TILE_TOKENS = "QDIT_TILE_TOKENS"
_MISSING = (
    "the CUDA kernels need NVRTC and its bindings, and this machine lacks {what}; "
    "install them with `pip install 'qdit[gpu]'`"
)


def compile_kernel(
    name: str, defines: Defines, architecture: str, form: Form = "cubin", *, cache: bool = True
) -> bytes:
    """Machine code ('cubin') or PTX of the kernel `name` for 'sm_80', 'sm_90a' or another one.

    Raises `InputError` where NVRTC is not installed, `StepError` with NVRTC's own log for a variant
    that does not compile.
    """
    files = dict(headers())
    if TILE_TOKENS in defines:
        files["wgmma.cuh"] = wgmma_header(defines[TILE_TOKENS])
    options = [
        f"--gpu-architecture={_virtual(architecture) if form == 'ptx' else architecture}",
        "--std=c++17",
        "-default-device",
        *(f"-D{key}={value}" for key, value in sorted(defines.items())),
    ]
    nvrtc = _nvrtc()
    path = _cached(nvrtc, name, files, options, form)
    if cache and path.is_file():
        return path.read_bytes()
    code = _compile(nvrtc, name, files, options, form)
    if cache:
        with atomic_path(path) as fresh:
            fresh.write_bytes(code)
    return code


def _virtual(architecture: str) -> str:
    return architecture.replace("sm_", "compute_")


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise InputError(_MISSING.format(what="cuda-bindings")) from error
    return nvrtc


def _cached(
    nvrtc: Any, name: str, files: Mapping[str, str], options: list[str], form: Form
) -> Path:
    digest = hashlib.sha256()
    for part in (str(_version(nvrtc)), name, source(name), *files.values(), *options, form):
        digest.update(part.encode())
        digest.update(b"\0")
    return cache_folder("kernels") / f"{Path(name).stem}-{digest.hexdigest()[:32]}.{form}"


def _version(nvrtc: Any) -> tuple[int, int]:
    try:
        _, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # the loader's own kinds: the library is absent or unloadable
        raise InputError(_MISSING.format(what="libnvrtc")) from error
    return int(major), int(minor)


def _compile(
    nvrtc: Any, name: str, files: Mapping[str, str], options: list[str], form: Form
) -> bytes:
    program = _checked(
        nvrtc,
        nvrtc.nvrtcCreateProgram(
            source(name).encode(),
            name.encode(),
            len(files),
            [text.encode() for text in files.values()],
            [header.encode() for header in files],
        ),
    )
    try:
        (status,) = nvrtc.nvrtcCompileProgram(
            program, len(options), [option.encode() for option in options]
        )
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = _read(nvrtc, program, "ProgramLog").rstrip(b"\0").decode()
            raise StepError(f"{name} does not compile with {' '.join(options)}: {log}")
        return _read(nvrtc, program, "CUBIN" if form == "cubin" else "PTX")
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _read(nvrtc: Any, program: Any, what: str) -> bytes:
    """One of a program's texts: its size, then its bytes."""
    size = _checked(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program))
    text = bytes(size)
    _checked(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, text))
    return text


def _checked(nvrtc: Any, result: tuple[Any, ...]) -> Any:
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise StepError(f"NVRTC failed: {status.name}")
    return values[0] if values else None
