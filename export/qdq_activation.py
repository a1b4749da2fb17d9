"""Dynamic group-wise activation quantization as standard operators."""

from __future__ import annotations

import onnx_ir as ir

from ..calibrate.integers import MIN_SCALE, IntegerRange
from ..calibrate.schemes import LayerScheme
from .emit import Dims, Emitter

_FLOAT, _INT64 = ir.DataType.FLOAT, ir.DataType.INT64
_INT8, _UINT8 = ir.DataType.INT8, ir.DataType.UINT8
_BYTE = 8


def emit_fake_quantization(
    emit: Emitter, x: ir.Value, scheme: LayerScheme, in_features: int, prefix: str
) -> ir.Value:
    """x [..., K] → its quantized and dequantized self, one scale a token and group: [..., K/g].

    Integers and scales equal `calibrate.quantizers.quantize_activation` to the bit: the same
    operations in the same order, in float32. Cases:

    1. Symmetric: s = max(max|x| / (2^(b-1)-1), MIN_SCALE), INT8. No Clip below 8 bits: |x/s| is
       at most 2^(b-1)-1 up to rounding, and rounds to no more.
    2. Asymmetric: the range is extended to 0; Z = clip(-round(low/s)), UINT8.
    3. Asymmetric below 8 bits: the integers are clipped to 2^b-1. x/s and low/s may both round
       up, and then their sum is one past the range.
    4. 'token': one block of all K channels.
    5. x in float16: Cast to float32 first and back last.
    """
    compute, shape = x.dtype, _dims(x)
    if compute is None:
        raise ValueError(f"the dtype of {x.name} is not known")
    if compute != _FLOAT:
        x = emit.node("Cast", [x], f"{prefix}/float32", _FLOAT, shape, to=_FLOAT.value)
    size = scheme.activation_group_size(in_features)
    if scheme.activation_symmetric:
        restored = _symmetric(emit, x, scheme.activation_bits, size, prefix)
    else:
        restored = _asymmetric(emit, x, scheme.activation_bits, size, prefix)
    if compute == _FLOAT:
        return restored
    return emit.node(
        "Cast", [restored], f"{prefix}/{compute.name.lower()}", compute, shape, to=compute.value
    )


def _symmetric(emit: Emitter, x: ir.Value, bits: int, size: int, prefix: str) -> ir.Value:
    shape, small = _dims(x), _scale_dims(x, size)
    groups = _groups(emit, x, size, prefix)
    magnitude = emit.node("Abs", [groups], f"{prefix}/magnitude", _FLOAT, _dims(groups))
    largest = _reduce(emit, "ReduceMax", magnitude, f"{prefix}/largest", small)
    scale = _scale(emit, largest, IntegerRange.of(bits, True).steps, prefix, small)
    blocks = {"axis": -1, "block_size": size}
    quantized = emit.node(
        "QuantizeLinear", [x, scale], f"{prefix}/quantized", _INT8, shape,
        output_dtype=_INT8.value, **blocks,
    )  # fmt: skip
    return emit.node(
        "DequantizeLinear", [quantized, scale], f"{prefix}/dequantized", _FLOAT, shape, **blocks
    )


def _asymmetric(emit: Emitter, x: ir.Value, bits: int, size: int, prefix: str) -> ir.Value:
    shape, small = _dims(x), _scale_dims(x, size)
    steps = IntegerRange.of(bits, False).steps
    groups = _groups(emit, x, size, prefix)
    zero = emit.constant(0.0, _FLOAT)
    least = _reduce(emit, "ReduceMin", groups, f"{prefix}/least", small)
    largest = _reduce(emit, "ReduceMax", groups, f"{prefix}/largest", small)
    low = emit.node("Min", [least, zero], f"{prefix}/low", _FLOAT, small)
    high = emit.node("Max", [largest, zero], f"{prefix}/high", _FLOAT, small)
    span = emit.node("Sub", [high, low], f"{prefix}/span", _FLOAT, small)
    scale = _scale(emit, span, steps, prefix, small)
    zero_point = _zero_point(emit, low, scale, steps, prefix, small)
    blocks = {"axis": -1, "block_size": size}
    quantized = emit.node(
        "QuantizeLinear", [x, scale, zero_point], f"{prefix}/quantized", _UINT8, shape, **blocks
    )
    if bits < _BYTE:
        bounds = [emit.constant(0, _UINT8), emit.constant(steps, _UINT8)]
        quantized = emit.node("Clip", [quantized, *bounds], f"{prefix}/clipped", _UINT8, shape)
    return emit.node(
        "DequantizeLinear", [quantized, scale, zero_point], f"{prefix}/dequantized", _FLOAT, shape,
        **blocks,
    )  # fmt: skip


def _zero_point(
    emit: Emitter, low: ir.Value, scale: ir.Value, steps: int, prefix: str, small: Dims
) -> ir.Value:
    """clip(-round(low/s), 0, steps) as UINT8."""
    ratio = emit.node("Div", [low, scale], f"{prefix}/low_steps", _FLOAT, small)
    rounded = emit.node("Round", [ratio], f"{prefix}/low_rounded", _FLOAT, small)
    negated = emit.node("Neg", [rounded], f"{prefix}/zero_point_unclipped", _FLOAT, small)
    bounds = [emit.constant(0.0, _FLOAT), emit.constant(float(steps), _FLOAT)]
    clipped = emit.node("Clip", [negated, *bounds], f"{prefix}/zero_point_float", _FLOAT, small)
    return emit.node("Cast", [clipped], f"{prefix}/zero_point", _UINT8, small, to=_UINT8.value)


def _scale(emit: Emitter, width: ir.Value, steps: int, prefix: str, small: Dims) -> ir.Value:
    """max(width / steps, MIN_SCALE)."""
    divisor = emit.constant(float(steps), _FLOAT)
    raw = emit.node("Div", [width, divisor], f"{prefix}/scale_unclipped", _FLOAT, small)
    least = emit.constant(MIN_SCALE, _FLOAT)
    return emit.node("Max", [raw, least], f"{prefix}/scale", _FLOAT, small)


def _groups(emit: Emitter, x: ir.Value, size: int, prefix: str) -> ir.Value:
    """[..., K] → [..., K/g, g]; Reshape's 0 copies a dimension of the input."""
    *leading, count = _scale_dims(x, size)
    shape = emit.constant([*(0 for _ in leading), -1, size], _INT64)
    return emit.node("Reshape", [x, shape], f"{prefix}/groups", _FLOAT, [*leading, count, size])


def _reduce(emit: Emitter, op_type: str, x: ir.Value, name: str, small: Dims) -> ir.Value:
    return emit.node(op_type, [x, emit.constant([-1], _INT64)], name, _FLOAT, small, keepdims=0)


def _dims(x: ir.Value) -> list[int | ir.SymbolicDim]:
    if x.shape is None:
        raise ValueError(f"the shape of {x.name} is not known")
    return list(x.shape)


def _scale_dims(x: ir.Value, size: int) -> list[int | ir.SymbolicDim]:
    *leading, channels = _dims(x)
    if not isinstance(channels, int):
        raise ValueError(f"the number of channels of {x.name} is not known")
    return [*leading, channels // size]
