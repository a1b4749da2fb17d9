"""How ONNX Runtime is told to run a file: provider, threads and its own session options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from ..errors import InputError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# What multiplies grouped weights and activations on a CPU (`cpu_kernels/choice.py`).
CpuKernels = Literal["auto", "qdit", "onnxruntime"]
# What people call them on other tools' command lines.
_SHORT = {"cpu": CPU, "cuda": CUDA}


def providers_of(provider: str | None, device: str = "cpu") -> list[str]:
    """The providers to ask for: the one named, else the device's; the CPU's for what it lacks.

    'cpu' and 'cuda' are short for ONNX Runtime's own names.
    """
    if provider is None:
        provider = CUDA if device.startswith("cuda") else CPU
    provider = _SHORT.get(provider, provider)
    return [provider] if provider == CPU else [provider, CPU]


def checked_kernels(word: str) -> CpuKernels:
    """'auto', 'qdit' or 'onnxruntime'. Raises `InputError` for another word."""
    for known in get_args(CpuKernels):
        if word == known:
            return known
    raise InputError(f"CPU kernels are one of {', '.join(get_args(CpuKernels))}, got {word!r}")


def parse_session_options(entries: Sequence[str]) -> dict[str, str]:
    """'session.use_env_allocators=1', … → a mapping. Raises `InputError` for another form."""
    for entry in entries:
        if "." not in entry.partition("=")[0]:
            raise _other_form("session option", "session.use_env_allocators=1", entry)
    return _parse(entries, "session option", "session.use_env_allocators=1")


def parse_provider_options(entries: Sequence[str]) -> dict[str, str]:
    """'enable_cuda_graph=1', … → a mapping. Raises `InputError` for another form."""
    return _parse(entries, "provider option", "enable_cuda_graph=1")


def _parse(entries: Sequence[str], what: str, example: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for entry in entries:
        key, separator, value = entry.partition("=")
        if not separator or not key or not value:
            raise _other_form(what, example, entry)
        if key in options:
            raise InputError(f"{what} {key} is given twice; give each once")
        options[key] = value
    return options


def _other_form(what: str, example: str, entry: str) -> InputError:
    return InputError(f"a {what} must look like {example}, got {entry!r}")
