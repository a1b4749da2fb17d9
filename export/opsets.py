"""What an exported file may be written in: opset versions, compute dtypes, names of our own."""

from __future__ import annotations

from typing import Literal, get_args

import onnx
import onnx_ir as ir
import torch

from ..errors import InputError

ComputeDtype = Literal["float32", "float16"]

# Blocked QuantizeLinear came with opset 21; TensorRT 11 reads up to 24, ONNX Runtime 1.31 up to 26.
OPSETS = (21, 22, 23, 24)
DEFAULT_OPSET = 21

# The domain of abstract nodes. It never leaves this package: `export/write.py` refuses it.
QDIT_DOMAIN = "qdit"
LINEAR_OP = "GroupQuantLinear"
BLOCK_OP = "BlockOutput"

# ONNX Runtime's own operators. Files of the `onnxruntime` target hold them, the reference never.
ORT_DOMAIN = "com.microsoft"

LINEARS_KEY = "qdit.linears"
BLOCKS_KEY = "qdit.blocks"

_TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16}
_ONNX_DTYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}


def check_opset(opset: int) -> None:
    """Raise `InputError` for an opset that cannot be written."""
    if isinstance(opset, bool) or opset not in OPSETS:
        raise InputError(
            f"opset must be one of {', '.join(map(str, OPSETS))} (blocked quantization needs 21), "
            f"got {opset!r}; the default is {DEFAULT_OPSET}"
        )
    newest = onnx.defs.onnx_opset_version()
    if opset > newest:
        raise InputError(
            f"the installed onnx {onnx.__version__} knows opsets up to {newest}, got {opset}; "
            "upgrade onnx or choose an older opset"
        )


def check_dtype(dtype: str) -> None:
    """Raise `InputError` for a compute dtype that cannot be written."""
    if dtype not in get_args(ComputeDtype):
        raise InputError(
            f"the compute dtype must be {' or '.join(get_args(ComputeDtype))}, got {dtype!r} "
            "(ONNX Runtime's CPU provider does not load bfloat16)"
        )


def torch_dtype(dtype: ComputeDtype) -> torch.dtype:
    return _TORCH_DTYPES[dtype]


def onnx_dtype(dtype: ComputeDtype) -> ir.DataType:
    return _ONNX_DTYPES[dtype]


def ir_version(opset: int) -> int:
    """The oldest IR version that the opset allows, 4-bit integers included where it has them."""
    needed: int = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    return needed
