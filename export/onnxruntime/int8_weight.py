"""Weights for int8 products: integers [K, N] with one scale a channel, 4 bits in the file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ...calibrate.quantizers import QuantizedWeight
from ..contents import LinearContents
from ..emit import Emitter
from ..qdq_weight import integer_tensor
from .rows import FLOAT, INT8, INT64

_INT4 = ir.DataType.INT4
_FOUR_BITS = 4


@dataclass(frozen=True)
class Int8Weight:
    """ŵ = scale · (values - zero_point): INT8 [K, N], float32 [N], INT8 [N] or None."""

    values: ir.Value
    scale: ir.Value
    zero_point: ir.Value | None


def emit_int8_weight(emit: Emitter, contents: LinearContents) -> Int8Weight:
    """The weight of a linear whose scales are one a channel, or integers times one a channel.

    Cases:

    1. Symmetric, 6 or 8 bits: the integers as they are.
    2. Symmetric, 4 bits or fewer: INT4, Cast to INT8.
    3. Integer scales: INT4, Cast, then each group times its multiplier. |q·m| ≤ 128, and 128 only
       as -8·16, so that INT8 holds it.
    4. Asymmetric: integers and zero points less 2^(b-1), stored as in 1 and 2; their difference
       stays what it was.

    What follows INT4 has constant inputs only: ONNX Runtime folds it as it loads the file, with
    whatever options, so that 4 bits are stored and 8 are multiplied.
    """
    spec, scheme = contents.spec, contents.scheme
    n, k = spec.out_features, spec.in_features
    name = f"{spec.name}.weight"
    narrow = scheme.weight_bits <= _FOUR_BITS
    stored = _INT4 if narrow else INT8
    values = emit.initializer(name, stored, [k, n], partial(_values, contents.quantized, stored))
    if narrow:
        values = emit.node("Cast", [values], f"{name}/int8", INT8, [k, n], to=INT8.value)
    if scheme.has_integer_scales:
        values = _scaled(emit, values, contents, name)
    scale = emit.initializer(f"{name}_scale", FLOAT, [n], partial(_scale, contents.quantized))
    zero_point = None
    if not scheme.weight_symmetric:
        load = partial(_zero_point, contents.quantized)
        zero_point = emit.initializer(f"{name}_zero_point", INT8, [n], load)
    return Int8Weight(values, scale, zero_point)


def _scaled(emit: Emitter, values: ir.Value, contents: LinearContents, name: str) -> ir.Value:
    """q [K, N] · m [K/g, 1, N], group by group."""
    n, k = contents.spec.out_features, contents.spec.in_features
    size = contents.scheme.weight_group_size(k)
    grouped = [k // size, size, n]
    multiplier = emit.initializer(
        f"{name}_multiplier", INT8, [k // size, 1, n], partial(_multiplier, contents.quantized)
    )
    shape = emit.constant(grouped, INT64)
    groups = emit.node("Reshape", [values, shape], f"{name}/groups", INT8, grouped)
    scaled = emit.node("Mul", [groups, multiplier], f"{name}/scaled", INT8, grouped)
    flat = emit.constant([k, n], INT64)
    return emit.node("Reshape", [scaled, flat], f"{name}/matrix", INT8, [k, n])


def _signed(values: Tensor, weight: QuantizedWeight) -> Tensor:
    """int8 as it is; uint8 less 2^(b-1)."""
    if weight.zero_point is None:
        return values
    return (values.to(torch.int16) - (1 << (weight.bits - 1))).to(torch.int8)


def _values(load: Callable[[], QuantizedWeight], dtype: ir.DataType) -> ir.TensorProtocol:
    weight = load()
    return integer_tensor(_signed(weight.values, weight).T, dtype)


def _zero_point(load: Callable[[], QuantizedWeight]) -> ir.TensorProtocol:
    weight = load()
    if weight.zero_point is None:
        raise ValueError("an asymmetric weight needs zero points")
    return integer_tensor(_signed(weight.zero_point[:, 0], weight), INT8)


def _multiplier(load: Callable[[], QuantizedWeight]) -> ir.TensorProtocol:
    multiplier = load().multiplier
    if multiplier is None:
        raise ValueError("integer scales need multipliers")
    return integer_tensor(multiplier.T.to(torch.int8).unsqueeze(1), INT8)


def _scale(load: Callable[[], QuantizedWeight]) -> ir.TensorProtocol:
    weight = load()
    scale = weight.scale if weight.multiplier is None else weight.channel_scale
    return ir.tensor(np.ascontiguousarray(scale[:, 0].numpy(), np.float32), FLOAT)
