"""`onnxruntime` and `qdq`: a folder's ONNX files in ONNX Runtime."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ...errors import InputError
from .kind import AUTO, EngineKind, EngineSettings, SamplingEngine

_CUDA = "CUDAExecutionProvider"


def _obstacle(file: str, folder: Path, settings: EngineSettings) -> str | None:
    import onnxruntime

    if not (folder / file).is_file():
        return f"the folder has no {file}"
    if settings.device in (AUTO, "cpu"):
        return None
    if _CUDA not in onnxruntime.get_available_providers():
        return f"this ONNX Runtime has no {_CUDA}; install qdit[gpu]"
    if settings.device not in ("cuda", "cuda:0"):
        return f"it runs on cuda:0, not on {settings.device}; set CUDA_VISIBLE_DEVICES"
    return None


def _open(file: str, folder: Path, settings: EngineSettings) -> SamplingEngine:
    import onnxruntime

    from ..onnxruntime_engine import CPU, OnnxRuntimeEngine

    wanted = settings.device != "cpu" and _CUDA in onnxruntime.get_available_providers()
    if wanted:
        try:
            return OnnxRuntimeEngine(
                folder / file, providers=[_CUDA, CPU], threads=settings.threads
            )
        except InputError:
            if settings.device != AUTO:
                raise
    return OnnxRuntimeEngine(folder / file, providers=[CPU], threads=settings.threads)


def _kind(name: str, file: str, summary: str) -> EngineKind:
    return EngineKind(name, summary, partial(_obstacle, file), partial(_open, file))


ONNXRUNTIME = _kind("onnxruntime", "onnxruntime/model.onnx", "the fast form in ONNX Runtime")
QDQ = _kind("qdq", "model.onnx", "the reference form in ONNX Runtime")
