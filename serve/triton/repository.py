"""Write a Triton model repository: REPOSITORY/NAME/config.pbtxt and REPOSITORY/NAME/1/model.*.

The server batches single denoiser calls of any step, so that a client's sampling loop needs nothing
of the others'; `client.TritonEngine` is an engine for such a loop.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ...calibrate.checkpoint import QuantizedCheckpoint
from ...engines.engine import TensorSpec
from ...engines.tensorrt.manifest import EngineManifest
from ...engines.tensorrt.store import FOLDER, engine_path, manifest_path
from ...errors import ArtifactError, InputError
from ...export.write import external_files
from ...files import sha256_of_file, write_text
from ...onnx_places import ONNXRUNTIME_CUDA_FILE, ONNXRUNTIME_FILE, QDQ_FILE
from ..artifacts import check_onnx
from .config import DEFAULT_MAX_BATCH, Device, TritonModel

CONFIG = "config.pbtxt"
_VERSION = "1"
_ONNX_FILES = (ONNXRUNTIME_FILE, QDQ_FILE)  # the faster first
_TENSORRT = ("tensorrt-plugin", "tensorrt-int8", "tensorrt-int4")
_EXACT = _TENSORRT[:1]  # what auto may take: the others mean something else than the plan


@dataclass(frozen=True)
class Source:
    """A file of an exported folder that a Triton backend runs, with its tensors.

    `data`: names of the files beside it that hold its external data.
    """

    path: Path
    model: TritonModel
    data: frozenset[str] = frozenset()

    @property
    def files(self) -> dict[str, Path]:
        """What belongs into the version's folder, by name there: external data keeps its own."""
        data = {name: self.path.with_name(name) for name in self.data}
        return {self.model.file_name: self.path} | data


def triton_source(
    folder: Path,
    engine: str = "auto",
    *,
    name: str | None = None,
    device: Device | None = None,
    max_batch: int = DEFAULT_MAX_BATCH,
    **settings: Any,
) -> Source:
    """The model of an exported folder as a server should run it.

    `engine`: onnxruntime (`onnxruntime/model.onnx`, or on cuda `onnxruntime-cuda/model.onnx`, else
    the reference form), qdq (the reference form), a built tensorrt-plugin, -int8 or -int4, or auto,
    which prefers tensorrt-plugin where `device` is not 'cpu'. `device` is cuda for TensorRT and
    else cpu by default; `settings` are the rest of `TritonModel`. Raises `InputError` where the
    folder has no such file, `ArtifactError` for a damaged checkpoint, an ONNX file that is not of
    it, or an engine that is not the one built.
    """
    checkpoint = QuantizedCheckpoint.read(folder)
    named = name or _slug(f"{checkpoint.model_name}-{checkpoint.plan.bits}")
    targets = {"auto": _EXACT}.get(engine, tuple(name for name in _TENSORRT if name == engine))
    built = _built_engine(folder, targets) if device != "cpu" else None
    if built is not None:
        onnx_path, manifest = built
        inputs, outputs = _specs(check_onnx(onnx_path, checkpoint))
        _check_engine(engine_path(onnx_path), manifest)
        if manifest.tensorrt.startswith("8."):
            inputs = [_narrowed(spec) for spec in inputs]
        most = min(max_batch, int(manifest.settings["batch"]["most"]))
        model = TritonModel(named, "tensorrt", inputs, outputs, device or "cuda", most, **settings)
        return Source(engine_path(onnx_path), model)
    fast = (ONNXRUNTIME_CUDA_FILE, *_ONNX_FILES) if device == "cuda" else _ONNX_FILES
    files = {"qdq": _ONNX_FILES[1:]}.get(engine, fast)
    path = next((folder / file for file in files if (folder / file).is_file()), None)
    if engine not in ("auto", "onnxruntime", "qdq") or path is None:
        raise InputError(
            "a Triton repository takes auto, or an engine that the folder has for the device: a "
            f"built tensorrt/*.engine, {' or '.join(_ONNX_FILES)} for onnxruntime or qdq; "
            f"{folder} has none for {engine!r}; export it with that --target"
        )
    file = check_onnx(path, checkpoint)
    inputs, outputs = _specs(file)
    model = TritonModel(
        named, "onnxruntime", inputs, outputs, device or "cpu", max_batch, **settings
    )
    return Source(path, model, frozenset(external_files(file)))


def write_triton_repository(source: Source, repository: Path) -> Path:
    """Put the model into `repository`, which may hold others; its folder is returned.

    A model of that name is replaced, whole or not at all. Raises `InputError` without
    `tritonclient`, and where `repository` is a file.
    """
    text = source.model.text()
    if repository.exists() and not repository.is_dir():
        raise InputError(f"a Triton repository is a folder, got the file {repository}")
    target = repository / source.model.name
    # a server that polls passes over folders that begin with a dot
    fresh = repository / f".{source.model.name}.{os.getpid()}.partial"
    try:
        version = fresh / _VERSION
        version.mkdir(parents=True)
        for name, path in source.files.items():
            shutil.copyfile(path, version / name)
        write_text(fresh / CONFIG, text)
        if target.exists():
            shutil.rmtree(target)
        fresh.replace(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return target


def _specs(model: onnx.ModelProto) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """(inputs, outputs) of an ONNX model, in its order."""
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    given = [value for value in graph.input if value.name not in weights]
    return [_spec(value) for value in given], [_spec(value) for value in graph.output]


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return TensorSpec(value.name, dtype, shape)


def _narrowed(spec: TensorSpec) -> TensorSpec:
    """TensorRT 8 makes INT32 of INT64 inputs."""
    is_wide = spec.dtype == np.int64
    return replace(spec, dtype=np.dtype(np.int32)) if is_wide else spec


def _check_engine(engine: Path, manifest: EngineManifest) -> None:
    if sha256_of_file(engine) != manifest.engine_sha256:
        raise ArtifactError(
            f"{engine} is not the engine that its manifest records; export with its --target again"
        )


def _built_engine(folder: Path, targets: Sequence[str]) -> tuple[Path, EngineManifest] | None:
    """The first finished engine: the path of its ONNX file, and its manifest."""
    for target in targets:
        path = folder / FOLDER / f"{target}.onnx"
        manifest = EngineManifest.read(manifest_path(engine_path(path)))
        if manifest is not None and engine_path(path).is_file() and path.is_file():
            return path, manifest
    return None


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")
