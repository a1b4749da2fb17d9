"""`onnxruntime-cuda`, `onnxruntime` and `qdq`: a folder's ONNX files in ONNX Runtime."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ...errors import InputError
from ...onnx_places import ONNXRUNTIME_CUDA_FILE, ONNXRUNTIME_FILE, QDQ_FILE
from ..session_settings import CPU, CUDA
from .kind import AUTO, EngineKind, EngineSettings, SamplingEngine


def _cuda_obstacle(folder: Path, settings: EngineSettings) -> str | None:
    """Why the CUDA provider's own file cannot run."""
    if not (folder / ONNXRUNTIME_CUDA_FILE).is_file():
        return f"the folder has no {ONNXRUNTIME_CUDA_FILE}"
    if settings.device == "cpu":
        return "its operators are the CUDA provider's; on a CPU use onnxruntime"
    return _provider_obstacle(settings)


def _obstacle(file: str, folder: Path, settings: EngineSettings) -> str | None:
    if not (folder / file).is_file():
        return f"the folder has no {file}"
    if settings.device in (AUTO, "cpu"):
        return None
    if why := _provider_obstacle(settings):
        return why
    if _quantizes_activations(folder):
        return (
            "ONNX Runtime's CUDA provider has no 8-bit QuantizeLinear in blocks; export with "
            "--target onnxruntime-cuda, or run it on the cpu"
        )
    return None


def _provider_obstacle(settings: EngineSettings) -> str | None:
    import onnxruntime

    if CUDA not in onnxruntime.get_available_providers():
        return f"this ONNX Runtime has no {CUDA}; install qdit[gpu]"
    if settings.device not in (AUTO, "cuda", "cuda:0"):
        return f"it runs on cuda:0, not on {settings.device}; set CUDA_VISIBLE_DEVICES"
    return None


def _quantizes_activations(folder: Path) -> bool:
    """Whether any linear of the folder's plan quantizes activations as it runs."""
    from ...calibrate.checkpoint import QuantizedCheckpoint

    plan = QuantizedCheckpoint.read(folder).plan
    return any(scheme.quantizes_activations for scheme in plan.layers.values())


def _open_cuda(folder: Path, settings: EngineSettings) -> SamplingEngine:
    from ..onnxruntime_engine import OnnxRuntimeEngine

    return OnnxRuntimeEngine(
        folder / ONNXRUNTIME_CUDA_FILE, providers=[CUDA, CPU], threads=settings.threads
    )


def _open(file: str, folder: Path, settings: EngineSettings) -> SamplingEngine:
    import onnxruntime

    from ..onnxruntime_engine import OnnxRuntimeEngine

    wanted = settings.device != "cpu" and CUDA in onnxruntime.get_available_providers()
    wanted = wanted and settings.cpu_kernels == "auto"  # another choice is one of a CPU
    if wanted and not _quantizes_activations(folder):
        try:
            return OnnxRuntimeEngine(folder / file, providers=[CUDA, CPU], threads=settings.threads)
        except InputError:
            if settings.device != AUTO:
                raise
    return OnnxRuntimeEngine(
        folder / file, providers=[CPU], threads=settings.threads, kernels=settings.cpu_kernels
    )


def _note(engine: SamplingEngine) -> str:
    from ..onnxruntime_engine import OnnxRuntimeEngine

    return engine.kernels.note if isinstance(engine, OnnxRuntimeEngine) else ""


def _kind(name: str, file: str, summary: str) -> EngineKind:
    return EngineKind(
        name,
        summary,
        partial(_obstacle, file),
        partial(_open, file),
        has_cpu_kernels=True,
        note=_note,
    )


ONNXRUNTIME_CUDA = EngineKind(
    "onnxruntime-cuda",
    "integer weights by ONNX Runtime's CUDA provider",
    _cuda_obstacle,
    _open_cuda,
)
ONNXRUNTIME = _kind("onnxruntime", ONNXRUNTIME_FILE, "the fast form in ONNX Runtime")
QDQ = _kind("qdq", QDQ_FILE, "the reference form in ONNX Runtime")
