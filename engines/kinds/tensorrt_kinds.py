"""`tensorrt-plugin`, `tensorrt-int8`, `tensorrt-int4`: engines that were built for this GPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from ...errors import ArtifactError, InputError
from ...files import sha256_of_file
from ..tensorrt.store import FOLDER, checked_engine, engine_path, why_not_here
from .kind import AUTO, EngineKind, EngineSettings, SamplingEngine


def _obstacle(target: str, folder: Path, settings: EngineSettings) -> str | None:
    from ..tensorrt.library import gpu_identity, installed_features

    path = engine_path(folder / FOLDER / f"{target}.onnx")
    if not path.is_file():
        return f"the folder has no {path.relative_to(folder)}"
    if settings.device not in (AUTO, "cuda", "cuda:0"):
        return f"it runs on cuda:0, not on {settings.device}; set CUDA_VISIBLE_DEVICES"
    try:
        installed_features()
        gpu_identity()
    except InputError as error:
        return str(error)
    return None


def _open(target: str, folder: Path, settings: EngineSettings) -> SamplingEngine:
    """Load the engine after its bytes, those it was built from and the installed TensorRT were held
    against its manifest.

    A serialized engine is code: one that is not the one that was built is never read.
    """
    from ..tensorrt.engine import TensorRtEngine
    from ..tensorrt.target import plugins_of

    source = folder / FOLDER / f"{target}.onnx"
    path = engine_path(source)
    manifest = checked_engine(path)
    for name, recorded in {path.name: manifest.engine_sha256, **manifest.sources}.items():
        file = source.with_name(name)
        if not file.is_file() or sha256_of_file(file) != recorded:
            raise ArtifactError(
                f"{file} is not what its engine's manifest records; export with --target {target} "
                "again"
            )
    if other := why_not_here(manifest):
        raise ArtifactError(
            f"{path} was built for another TensorRT than this machine's ({other}); export with "
            f"--target {target} again"
        )
    plugins_of(target)()
    return TensorRtEngine(path)


def _largest(engine: Any) -> int:
    return int(engine.batch_profile[2])


def _kind(target: str, summary: str) -> EngineKind:
    return EngineKind(
        target,
        summary,
        partial(_obstacle, target),
        partial(_open, target),
        largest_batch=_largest,
    )


PLUGIN = _kind("tensorrt-plugin", "TensorRT, exact by qdit's plugin")
INT8 = _kind("tensorrt-int8", "TensorRT, static INT8")
INT4 = _kind("tensorrt-int4", "TensorRT, INT4 weights")
