"""A linear's weight as standard operators: blocked DequantizeLinear along K on [K, N]."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ..calibrate.quantizers import QuantizedWeight
from ..calibrate.schemes import LayerScheme, ScaleDtype
from .contents import LinearContents
from .emit import Emitter
from .opsets import ComputeDtype, onnx_dtype, torch_dtype

_FOUR_BITS = 4


def emit_weight(emit: Emitter, contents: LinearContents, dtype: ComputeDtype) -> ir.Value:
    """The matrix [K, N] in the compute dtype.

    Cases:

    1. Quantized by groups of g: integers [K, N], scale and zero point [K/g, N],
       DequantizeLinear(axis=0, block_size=g).
    2. Quantized by channel: integers [K, N], scale and zero point [N], DequantizeLinear(axis=1).
    3. 2, 3 or 4 bits are stored as INT4 or UINT4, 6 and 8 bits as INT8 or UINT8; U when asymmetric.
    4. float32 scales under float16 compute: dequantized in float32, then Cast; a float16 scale
       would round twice.
    5. Integer scales: the groups' factors s·m as float32 scales, so that every case above holds.
       They have up to 15 significant bits, so a float16 file takes them as in case 4.
    6. Not quantized: a float initializer [K, N].

    After 1 and 2 a Reshape to the same [K, N] keeps runtimes from fusing DequantizeLinear and
    MatMul into a product with other semantics (docs/adr/0003).
    """
    spec, scheme = contents.spec, contents.scheme
    n, k = spec.out_features, spec.in_features
    compute = onnx_dtype(dtype)
    if not scheme.quantizes_weights:
        load = partial(_transposed, contents.weight, torch_dtype(dtype))
        return emit.initializer(f"{spec.name}.weight", compute, [k, n], load)
    size = scheme.weight_group_size(k)
    by_channel = scheme.weight_group == "channel"
    integers = storage_dtype(scheme.weight_bits, scheme.weight_symmetric)
    scales = onnx_dtype(_scale_dtype(scheme)) if dtype == "float16" else compute
    name = f"{spec.name}.weight"
    small = [n] if by_channel else [k // size, n]
    inputs = [
        emit.initializer(name, integers, [k, n], partial(_integers, contents.quantized, integers)),
        emit.initializer(
            f"{name}_scale", scales, small, partial(_scale, contents.quantized, scales, by_channel)
        ),
    ]
    if not scheme.weight_symmetric:
        load = partial(_zero_point, contents.quantized, integers, by_channel)
        inputs.append(emit.initializer(f"{name}_zero_point", integers, small, load))
    blocks = {"axis": 1} if by_channel else {"axis": 0, "block_size": size}
    matrix = emit.node("DequantizeLinear", inputs, f"{name}/dequantized", scales, [k, n], **blocks)
    if scales != compute:
        matrix = emit.node("Cast", [matrix], f"{name}/cast", compute, [k, n], to=compute.value)
    shape = emit.constant([k, n], ir.DataType.INT64)
    return emit.node("Reshape", [matrix, shape], f"{name}/matrix", compute, [k, n])


def _scale_dtype(scheme: LayerScheme) -> ScaleDtype:
    """The narrowest dtype that holds the factors of all groups."""
    return "float32" if scheme.has_integer_scales else scheme.scale_dtype


def storage_dtype(bits: int, symmetric: bool) -> ir.DataType:
    """The ONNX integer type that holds a weight of `bits` bits."""
    if bits <= _FOUR_BITS:
        return ir.DataType.INT4 if symmetric else ir.DataType.UINT4
    return ir.DataType.INT8 if symmetric else ir.DataType.UINT8


def _integers(load: Callable[[], QuantizedWeight], dtype: ir.DataType) -> ir.TensorProtocol:
    return integer_tensor(load().values.T, dtype)


def _zero_point(
    load: Callable[[], QuantizedWeight], dtype: ir.DataType, by_channel: bool
) -> ir.TensorProtocol:
    zero_point = load().zero_point
    if zero_point is None:
        raise ValueError("an asymmetric weight needs zero points")
    return integer_tensor(zero_point[:, 0] if by_channel else zero_point.T, dtype)


def _scale(
    load: Callable[[], QuantizedWeight], dtype: ir.DataType, by_channel: bool
) -> ir.TensorProtocol:
    scale = load().scale
    chosen = scale[:, 0] if by_channel else scale.T
    return ir.tensor(np.ascontiguousarray(chosen.numpy(), dtype.numpy()), dtype)


def _transposed(load: Callable[[], Tensor], dtype: torch.dtype) -> ir.TensorProtocol:
    return ir.tensor(load().to(dtype).T.contiguous().numpy())


def integer_tensor(values: Tensor, dtype: ir.DataType) -> ir.TensorProtocol:
    """int8 or uint8 values of any shape as a tensor of `dtype`.

    4-bit integers go two a byte in row-major order, the earlier one in the low nibble (ONNX IR,
    'packed' types); an odd last one is padded with a zero nibble:
    -2, -1, 0, 1 → 0xE, 0xF, 0x0, 0x1 → b"\\xfe\\x10".
    """
    array = np.ascontiguousarray(values.numpy())
    if dtype.bitwidth == 8:
        return ir.tensor(array, dtype)
    nibbles = array.reshape(-1).view(np.uint8) & 0x0F
    if nibbles.size % 2:
        nibbles = np.append(nibbles, np.uint8(0))
    packed = nibbles[0::2] | (nibbles[1::2] << 4)
    return ir.PackedTensor(packed, dtype, shape=ir.Shape(array.shape))
