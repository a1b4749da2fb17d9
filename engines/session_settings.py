"""How ONNX Runtime is told to run a file: provider, threads and its own session options."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import InputError

CPU = "CPUExecutionProvider"


def providers_of(provider: str | None, device: str = "cpu") -> list[str]:
    """The providers to ask for: the one named, else the device's; the CPU's for what it lacks."""
    if provider is None:
        provider = "CUDAExecutionProvider" if device.startswith("cuda") else CPU
    return [provider] if provider == CPU else [provider, CPU]


def parse_session_options(entries: Sequence[str]) -> dict[str, str]:
    """'session.use_env_allocators=1', … → a mapping. Raises `InputError` for another form."""
    options: dict[str, str] = {}
    for entry in entries:
        key, separator, value = entry.partition("=")
        if not separator or "." not in key or not value:
            raise InputError(
                f"a session option must look like session.use_env_allocators=1, got {entry!r}"
            )
        if key in options:
            raise InputError(f"session option {key} is given twice; give each once")
        options[key] = value
    return options
