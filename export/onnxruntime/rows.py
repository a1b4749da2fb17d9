"""Pieces of symmetric dynamic quantization that several lowerings emit: scales, integers, parts.

Every value equals that of `calibrate.quantizers.quantize_activation` to the bit: the same single
operations in float32. They are written for few passes over the data, which is what they cost.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...calibrate.integers import MIN_SCALE, IntegerRange
from ..emit import Emitter

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
INT8, UINT8 = ir.DataType.INT8, ir.DataType.UINT8
# What unsigned integers are shifted by, so that they hold signed ones: -128 … 127 → 0 … 255.
OFFSET = 128


def dims(x: ir.Value) -> list[int | ir.SymbolicDim]:
    """The dimensions of a value whose shape is known."""
    if x.shape is None:
        raise ValueError(f"the shape of {x.name} is not known")
    return list(x.shape)


def channels(x: ir.Value) -> int:
    """The last dimension, which is always a number."""
    last = dims(x)[-1]
    if not isinstance(last, int):
        raise ValueError(f"the number of channels of {x.name} is not known")
    return last


def emit_groups(emit: Emitter, x: ir.Value, size: int, prefix: str) -> ir.Value:
    """[..., K] → [..., K/size, size]; Reshape's 0 copies a dimension of the input."""
    leading = dims(x)[:-1]
    count = channels(x) // size
    shape = emit.constant([*(0 for _ in leading), count, size], INT64)
    return emit.node("Reshape", [x, shape], f"{prefix}/groups", FLOAT, [*leading, count, size])


def emit_flat(emit: Emitter, groups: ir.Value, name: str) -> ir.Value:
    """The inverse of `emit_groups`: [..., G, g] → [..., G·g]."""
    *leading, count, size = dims(groups)
    if not isinstance(count, int) or not isinstance(size, int):
        raise ValueError(f"the groups of {groups.name} are not known")
    shape = emit.constant([*(0 for _ in leading), count * size], INT64)
    return emit.node("Reshape", [groups, shape], name, FLOAT, [*leading, count * size])


def emit_scale(
    emit: Emitter, x: ir.Value, bits: int, prefix: str, least: float = MIN_SCALE
) -> ir.Value:
    """max(max|x| / (2^(b-1)-1), `least`) over the last dimension, which becomes 1.

    The largest and the least value are found in one pass each, which only reads. |x| would be a
    value of its own, written and read again: half as fast.
    """
    small = [*dims(x)[:-1], 1]
    steps = float(IntegerRange.of(bits, True).steps)
    last = emit.constant([-1], INT64)
    parts = []
    for op_type, name, divisor in (("ReduceMax", "high", steps), ("ReduceMin", "low", -steps)):
        bound = emit.node(op_type, [x, last], f"{prefix}/{name}", FLOAT, small, keepdims=1)
        by = emit.constant(divisor, FLOAT)
        parts.append(emit.node("Div", [bound, by], f"{prefix}/{name}_steps", FLOAT, small))
    parts.append(emit.constant(least, FLOAT))
    return emit.node("Max", parts, f"{prefix}/scale", FLOAT, small)


def block_signs(count: int) -> np.ndarray:
    """+1 or -1 for each of `count` blocks, float32: the Thue-Morse sequence, + - - + - + + - …

    Any run of blocks then adds up to almost nothing, whatever drifts along K. Plain alternation
    left up to three times the error (`nbits_weight.py` says of what).
    """
    ones = [bin(index).count("1") for index in range(count)]
    return np.array([-1 if one % 2 else 1 for one in ones], np.float32)


def emit_turned(emit: Emitter, scale: ir.Value, prefix: str) -> ir.Value:
    """The scales [..., G, 1] of groups with the signs of their blocks."""
    count = dims(scale)[-2]
    if not isinstance(count, int):
        raise ValueError(f"the groups of {scale.name} are not known")
    name = f"constant/signs/{count}"
    signs = emit.graph.initializers.get(name) or emit.initializer(
        name, FLOAT, [count, 1], lambda: ir.tensor(block_signs(count)[:, None])
    )
    return emit.node("Mul", [scale, signs], f"{prefix}/turned", FLOAT, dims(scale))


def emit_restored_groups(emit: Emitter, x: ir.Value, size: int, prefix: str) -> ir.Value:
    """x [..., K] float32 → its 8-bit fake quantization in groups of `size`, every other negated.

    The signs are `block_signs`. Case 1 of `qdq_activation.emit_fake_quantization` in faster
    operators: blocked DequantizeLinear takes twice the time of Cast and Mul.
    """
    groups = emit_groups(emit, x, size, prefix)
    scale = emit_scale(emit, groups, 8, prefix)
    shape = dims(groups)
    integers = emit.node(
        "QuantizeLinear", [groups, scale], f"{prefix}/quantized", INT8, shape,
        axis=-1, block_size=size, output_dtype=INT8.value,
    )  # fmt: skip
    whole = emit.node("Cast", [integers], f"{prefix}/integers", FLOAT, shape, to=FLOAT.value)
    turned = emit_turned(emit, scale, prefix)
    restored = emit.node("Mul", [whole, turned], f"{prefix}/restored", FLOAT, shape)
    return emit_flat(emit, restored, f"{prefix}/dequantized")


def emit_columns(emit: Emitter, x: ir.Value, start: int, stop: int, name: str) -> ir.Value:
    """x[..., start:stop]."""
    bounds = [emit.constant([number], INT64) for number in (start, stop, -1)]
    shape = [*dims(x)[:-1], stop - start]
    return emit.node("Slice", [x, *bounds], name, FLOAT, shape)
