"""Weights of `com.microsoft::MatMulNBits` as ONNX Runtime's CUDA provider reads them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ...calibrate.quantizers import QuantizedWeight
from ..contents import LinearContents
from ..emit import Emitter
from .nbits_weight import pack

_FLOAT16, _UINT8 = ir.DataType.FLOAT16, ir.DataType.UINT8
_FOUR_BITS, _BYTE = 4, 8


def emit_cuda_weight(
    emit: Emitter, contents: LinearContents, block: int
) -> tuple[list[ir.Value | None], dict[str, Any]]:
    """MatMulNBits' inputs after the activations, and its attributes.

    B is UINT8 [N, K/block, block·bits/8], scales float16 [N, K/block], zero points UINT8
    [N, ⌈K/block·bits/8⌉]. Cases:

    1. 2, 3 and 4 bits are stored as 4, 6 and 8 bits as 8.
    2. Symmetric: integers are shifted by 2^(stored bits - 1), the operator's zero point where none
       is given, so that none has to be read.
    3. Asymmetric: the plan's integers and zero points.
    4. `block` smaller than the weight group: scales and zero points are repeated.
    5. Float32 scales, and the factors s·m of integer ones (up to 15 significant bits), are rounded
       to float16: the operator takes scales of its activations' type alone.
    """
    spec, scheme = contents.spec, contents.scheme
    n, k = spec.out_features, spec.in_features
    bits = _FOUR_BITS if scheme.weight_bits <= _FOUR_BITS else _BYTE
    repeats = scheme.weight_group_size(k) // block
    name, load, count = f"{spec.name}.weight", contents.quantized, k // block
    inputs: list[ir.Value | None] = [
        emit.initializer(
            name,
            _UINT8,
            [n, count, block * bits // 8],
            partial(_values, load, bits, block),
        ),
        emit.initializer(f"{name}_scale", _FLOAT16, [n, count], partial(_scale, load, repeats)),
    ]
    if not scheme.weight_symmetric:
        zero_point = partial(_zero_point, load, bits, repeats)
        width = -(-count * bits // 8)
        inputs.append(emit.initializer(f"{name}_zero_point", _UINT8, [n, width], zero_point))
    return inputs, {"K": k, "N": n, "bits": bits, "block_size": block}


def _values(load: Callable[[], QuantizedWeight], bits: int, block: int) -> ir.TensorProtocol:
    weight = load()
    n, k = weight.values.shape
    values = weight.values
    if weight.zero_point is None:
        values = (values.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    packed = pack(values.reshape(n, k // block, block), bits)
    return ir.tensor(packed.contiguous().numpy(), _UINT8)


def _scale(load: Callable[[], QuantizedWeight], repeats: int) -> ir.TensorProtocol:
    scale = load().scale.repeat_interleave(repeats, 1)
    return ir.tensor(np.ascontiguousarray(scale.numpy(), np.float16), _FLOAT16)


def _zero_point(load: Callable[[], QuantizedWeight], bits: int, repeats: int) -> ir.TensorProtocol:
    zero_point: Tensor | None = load().zero_point
    if zero_point is None:
        raise ValueError("an asymmetric weight needs zero points")
    packed = pack(zero_point.repeat_interleave(repeats, 1), bits)
    return ir.tensor(packed.contiguous().numpy(), _UINT8)
