"""The engines at hand for an exported folder: one line each, best first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from .kinds.kind import AUTO, EngineKind, EngineSettings, SamplingEngine
from .probe_check import SelfTestError


@dataclass(frozen=True)
class OpenedEngine:
    """An engine and the kind that it is of."""

    kind: EngineKind
    engine: SamplingEngine


def open_engine(
    folder: Path,
    name: str = AUTO,
    settings: EngineSettings | None = None,
    *,
    say: Callable[[str], None] = lambda message: None,
) -> OpenedEngine:
    """Open the engine called `name`, or with 'auto' the best that opens.

    `say` hears why better ones were passed over. Raises `InputError` with every reason where none
    will do.
    """
    settings = settings or EngineSettings()
    if name != AUTO:
        kind = _kind_named(name)
        if obstacle := _obstacle(kind, folder, settings):
            raise InputError(f"engine {name} cannot run {folder}: {obstacle}")
        return OpenedEngine(kind, kind.open(folder, settings))
    reasons = []
    for kind in _kinds():
        opened, reason = _try_open(kind, folder, settings)
        if opened is not None:
            return opened
        reasons.append(f"{kind.name}: {reason}")
        say(f"engine {kind.name} passed over: {reason}")
    raise InputError(f"no engine can run {folder}: " + "; ".join(reasons))


def _try_open(
    kind: EngineKind, folder: Path, settings: EngineSettings
) -> tuple[OpenedEngine | None, str]:
    if obstacle := _obstacle(kind, folder, settings):
        return None, obstacle
    try:
        return OpenedEngine(kind, kind.open(folder, settings)), ""
    except (InputError, SelfTestError) as error:  # what shows only on loading
        return None, str(error)


def _obstacle(kind: EngineKind, folder: Path, settings: EngineSettings) -> str | None:
    if settings.cpu_kernels != "auto" and not kind.has_cpu_kernels:
        return f"it has no choice of CPU kernels, got {settings.cpu_kernels}; leave it to auto"
    return kind.obstacle(folder, settings)


def engine_names() -> tuple[str, ...]:
    """The names that `--engine` takes beside 'auto', best first."""
    return tuple(kind.name for kind in _kinds())


def _kind_named(name: str) -> EngineKind:
    for kind in _kinds():
        if kind.name == name:
            return kind
    raise InputError(f"engine must be auto or one of {', '.join(engine_names())}, got {name!r}")


def _kinds() -> tuple[EngineKind, ...]:
    """Best first. Kinds import their runtimes in their functions.

    TensorRT's own INT8 and INT4 mean something else than the plan (docs/targets.md): they come
    after what is exact, and so are taken by name only.
    """
    from .kinds import onnxruntime_kinds, tensorrt_kinds, torch_kind

    return (
        tensorrt_kinds.PLUGIN,
        torch_kind.TORCH,
        onnxruntime_kinds.ONNXRUNTIME_CUDA,
        onnxruntime_kinds.ONNXRUNTIME,
        onnxruntime_kinds.QDQ,
        tensorrt_kinds.INT8,
        tensorrt_kinds.INT4,
    )
