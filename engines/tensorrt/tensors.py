"""An engine's tensors: their dtypes in NumPy and torch, and tensors that fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ArtifactError, InputError
from ..engine import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

BATCH = "batch"  # the one dynamic dimension


def numpy_dtype(trt: Any, engine: Any, name: str) -> np.dtype[Any]:
    """What an engine itself reads or writes. Raises `ArtifactError` for what NumPy has not."""
    kind = engine.get_tensor_dtype(name)
    dtypes = {
        "FLOAT": np.float32,
        "HALF": np.float16,
        "INT32": np.int32,
        "INT64": np.int64,
        "INT8": np.int8,
        "BOOL": np.bool_,
        "UINT8": np.uint8,
    }
    if kind.name not in dtypes:
        raise ArtifactError(f"{name} is {kind.name}, which NumPy has no dtype for")
    return np.dtype(dtypes[kind.name])


def torch_dtype(dtype: np.dtype[Any]) -> Any:
    """The `torch.dtype` of the same name."""
    import torch

    return getattr(torch, dtype.name.removesuffix("_"))


def check_tensor(spec: TensorSpec, inputs: dict[str, Tensor], dtype: np.dtype[Any]) -> None:
    """Raise `InputError` unless the tensor of `spec` is there, contiguous, on CUDA and fitting."""
    if spec.name not in inputs:
        raise InputError(f"the input {spec.name} is missing, got {', '.join(inputs)}")
    tensor = inputs[spec.name]
    if tensor.dtype != torch_dtype(dtype) or not tensor.is_cuda or not tensor.is_contiguous():
        raise InputError(
            f"input {spec.name} must be a contiguous CUDA tensor of {dtype}, got {tensor.dtype} on "
            f"{tensor.device}"
        )
    wanted = [size for size in spec.shape if size != BATCH]
    if tensor.dim() != len(spec.shape) or list(tensor.shape[1:]) != wanted:
        raise InputError(f"input {spec.name} must be {list(spec.shape)}, got {list(tensor.shape)}")
