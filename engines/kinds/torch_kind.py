"""`torch`: the checkpoint on the CUDA kernels."""

from __future__ import annotations

from pathlib import Path

from ...calibrate.checkpoint import QuantizedCheckpoint
from .kind import AUTO, EngineKind, EngineSettings, SamplingEngine


def _obstacle(folder: Path, settings: EngineSettings) -> str | None:
    import torch

    if settings.device == "cpu":
        return "it runs on CUDA devices; on a CPU its reference is for checking only"
    if not torch.cuda.is_available():
        return "it needs a CUDA device and torch with CUDA"
    return None


def _open(folder: Path, settings: EngineSettings) -> SamplingEngine:
    from ..torch_engine.engine import TorchEngine

    device = "cuda" if settings.device == AUTO else settings.device
    return TorchEngine(QuantizedCheckpoint.read(folder), device=device)


# a CUDA graph is captured for each size
TORCH = EngineKind(
    "torch",
    "CUDA kernels under PyTorch",
    _obstacle,
    _open,
    batch_sizes=(2, 4, 8, 16, 32, 48, 64, 96, 128),
)
