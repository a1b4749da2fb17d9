"""A model's configuration for Triton Inference Server, by Triton's own protobuf schema.

The schema is `model_config.proto` of triton-inference-server/common, compiled in `tritonclient`;
what a server refuses beyond it is `ValidateModelConfig` of triton-inference-server/core.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np

from ...engines.engine import TensorSpec
from ...errors import InputError

Backend = Literal["onnxruntime", "tensorrt"]
Device = Literal["cpu", "cuda"]

DEFAULT_MAX_BATCH = 64

_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class TritonModel:
    """What a server is told of a model.

    * `inputs`, `outputs`: as in the ONNX file, the batch first;
    * `max_batch`: most samples of one call, and `max_queue` of the calls that wait for one;
    * `delay_us`: microseconds that a call may wait for others to join it;
    * `instances`: copies of the model on each device;
    * `threads`: of one call in ONNX Runtime on a CPU, None for all cores.

    Raises `InputError` for what a server would refuse.
    """

    name: str
    backend: Backend
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    device: Device = "cpu"
    max_batch: int = DEFAULT_MAX_BATCH
    max_queue: int = 256
    delay_us: int = 2000
    instances: int = 1
    threads: int | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InputError(
                "a Triton model's name is a folder of letters, digits, '.', '_' and '-', got "
                f"{self.name!r}"
            )
        if self.backend == "tensorrt" and self.device == "cpu":
            raise InputError("a TensorRT engine runs on a GPU, got device cpu; use --device cuda")
        for name, value, least in (
            ("max_batch", self.max_batch, 1),
            ("max_queue", self.max_queue, 1),
            ("delay_us", self.delay_us, 0),
            ("instances", self.instances, 1),
        ):
            if value < least:
                raise InputError(f"{name} of a Triton model must be at least {least}, got {value}")

    @property
    def file_name(self) -> str:
        """What the backend reads in a version's folder."""
        return "model.plan" if self.backend == "tensorrt" else "model.onnx"

    def config(self) -> Any:
        """The `inference.ModelConfig` message. Raises `InputError` without `tritonclient`."""
        schema = schema_module()
        config = schema.ModelConfig(
            name=self.name,
            backend=self.backend,
            max_batch_size=self.max_batch,
            default_model_filename=self.file_name,
        )
        config.input.extend(_tensor(schema.ModelInput, spec) for spec in self.inputs)
        config.output.extend(_tensor(schema.ModelOutput, spec) for spec in self.outputs)
        batching = config.dynamic_batching
        batching.max_queue_delay_microseconds = self.delay_us
        batching.default_queue_policy.max_queue_size = self.max_queue
        kind = "KIND_CPU" if self.device == "cpu" else "KIND_GPU"
        config.instance_group.add(
            count=self.instances, kind=schema.ModelInstanceGroup.Kind.Value(kind)
        )
        if self.backend == "onnxruntime" and self.threads is not None:
            config.parameters["intra_op_thread_count"].string_value = str(self.threads)
        self._warm_up(config, schema)
        return config

    def text(self) -> str:
        """The configuration as `config.pbtxt` has it."""
        config = self.config()
        from google.protobuf import text_format

        made: str = text_format.MessageToString(config)
        return made

    def _warm_up(self, config: Any, schema: ModuleType) -> None:
        """The first call of a runtime is slow: a server makes it before it is ready."""
        warm_up = config.model_warmup.add(name="one sample", batch_size=1)
        for spec in self.inputs:
            given = warm_up.inputs[spec.name]
            given.data_type = schema.DataType.Value(_type_of(spec.dtype))
            given.dims.extend(_sample_dims(spec) or [1])
            given.zero_data = True


def schema_module() -> ModuleType:
    """Triton's schema as Python classes. Raises `InputError` where it is not installed."""
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise InputError(
            f"a Triton model repository needs {error.name}; install it with "
            "`pip install qdit[triton]`"
        ) from error
    module: ModuleType = model_config_pb2
    return module


def _tensor(kind: Any, spec: TensorSpec) -> Any:
    """One value a sample is `dims: 1` with an empty reshape: Triton has no tensors without axes."""
    dims = _sample_dims(spec)
    made = kind(name=spec.name, data_type=_type_of(spec.dtype), dims=dims or [1])
    if not dims:
        made.reshape.SetInParent()
    return made


def _sample_dims(spec: TensorSpec) -> list[int]:
    """The axes after the batch. Raises `InputError` for a tensor without a batch."""
    batch, *dims = spec.shape or (0,)
    if isinstance(batch, int) or not all(isinstance(size, int) for size in dims):
        raise InputError(
            f"Triton batches the first axis, the only dynamic one; got {spec.name} {spec.shape}"
        )
    return [int(size) for size in dims]


def _type_of(dtype: np.dtype[Any]) -> str:
    if dtype.name not in _TYPES:
        raise InputError(f"Triton models here have {', '.join(_TYPES)} tensors, got {dtype}")
    return _TYPES[dtype.name]
