"""The targets that `qdit-bench` knows. A new one joins with one line here and its own module."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import InputError
from .target import Target


@dataclass(frozen=True)
class Registration:
    """`path` is 'module:class'; the module is imported only where the target is used.

    `quantized`: whether the target runs the quantized model or the full-precision one.
    """

    name: str
    path: str
    summary: str
    quantized: bool

    def load(self) -> Target:
        """Import the module and build the target."""
        module, _, attribute = self.path.partition(":")
        target: Target = getattr(importlib.import_module(module, __package__), attribute)()
        return target


TARGETS: dict[str, Registration] = {}


def register(name: str, path: str, summary: str, *, quantized: bool) -> None:
    """Make a target known to `qdit-bench` (see `Registration`)."""
    TARGETS[name] = Registration(name, path, summary, quantized)


_ONNX = ".targets.onnxruntime_targets"
_TENSORRT = ".targets.tensorrt_targets"
_TORCH = ".targets.torch_targets"
_PEERS = ".targets.peer_targets"
register("fp32", f"{_ONNX}:FullPrecision", "full-precision ONNX in ONNX Runtime", quantized=False)
register("fp16", f"{_ONNX}:HalfPrecision", "float16 ONNX, fused", quantized=False)
register("qdq", f"{_ONNX}:Qdq", "quantized model.onnx in ONNX Runtime", quantized=True)
register("qdq-packed", f"{_ONNX}:QdqPacked", "model.onnx, weights kept packed", quantized=True)
register("onnxruntime", f"{_ONNX}:OnnxRuntimeTarget", "its own file, int8", quantized=True)
register("onnxruntime-cuda", f"{_ONNX}:OnnxRuntimeCudaTarget", "CUDA's file", quantized=True)
register("tensorrt-fp16", f"{_TENSORRT}:HalfPrecision", "unquantized TensorRT", quantized=False)
register("tensorrt-plugin", f"{_TENSORRT}:Plugin", "the CUDA kernels in TensorRT", quantized=True)
register("tensorrt-int8", f"{_TENSORRT}:Int8", "TensorRT's INT8 products", quantized=True)
register("tensorrt-int4", f"{_TENSORRT}:Int4", "TensorRT's INT4 weights", quantized=True)
register("torch", f"{_TORCH}:Eager", "full precision in PyTorch, eager", quantized=False)
register("torch-bf16", f"{_TORCH}:EagerBFloat16", "bfloat16 in PyTorch, eager", quantized=False)
register("torch-compile", f"{_TORCH}:Compiled", "full precision, torch.compile", quantized=False)
register("torch-quantized", f"{_TORCH}:Quantized", "the CUDA kernels in PyTorch", quantized=True)
register("torch-simulation", f"{_TORCH}:Simulation", "simulated quantization", quantized=True)
register("ort-dynamic", f"{_PEERS}:OnnxRuntimeDynamic", "quantize_dynamic of fp32", quantized=False)
register("torchao-int8", f"{_PEERS}:TorchAoInt8", "torchao int8, compiled", quantized=False)
register("openvino", f"{_PEERS}:OpenVino", "full precision in OpenVINO", quantized=False)
register("openvino-int8", f"{_PEERS}:OpenVinoInt8", "NNCF int8 in OpenVINO", quantized=False)

# What reads RunSettings.provider, .session_options and .provider_options.
IN_ONNX_RUNTIME = (
    "fp32",
    "fp16",
    "qdq",
    "qdq-packed",
    "onnxruntime",
    "onnxruntime-cuda",
    "ort-dynamic",
)

# What reads RunSettings.cpu_kernels: the one file that has products of grouped activations.
HAS_CPU_KERNELS = "onnxruntime"


def registrations(names: Sequence[str]) -> list[Registration]:
    """The registrations of `names`, in order; `InputError` for an unknown or repeated name."""
    if not names:
        raise InputError(f"name at least one target; the targets are {', '.join(TARGETS)}")
    for position, name in enumerate(names):
        if name not in TARGETS:
            raise InputError(f"unknown target {name!r}; the targets are {', '.join(TARGETS)}")
        if name in names[:position]:
            raise InputError(f"target {name!r} is named twice; name each target once")
    return [TARGETS[name] for name in names]
