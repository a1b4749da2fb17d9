"""What the plugins compute, in standard operators: the bodies that other runtimes run instead.

Each reads and writes the very tensors of the kernels (`engines/kernels/layouts.py` has them): a
panel is 128 neighbouring k of all rows, its 16-byte chunks swizzled by the row; a row's scale
stands where a thread of the product looks for it; 4-bit weights lie in the order of the matrix
unit's registers. So a plugin's outputs can be held against a body's, value by value.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...calibrate.integers import MIN_SCALE
from .function_body import Body
from .plugin_nodes import (
    NAMESPACE,
    ProductVariant,
    RowsVariant,
    Variant,
    WeightOnlyVariant,
)

PANEL = 128
_ROWS = 16  # rows are padded to this many
_CHUNKS, _CHUNK, _ATOM = 8, 16, 8
_FLOAT, _HALF = ir.DataType.FLOAT.value, ir.DataType.FLOAT16.value
_INT8, _UINT8, _INT32 = (t.value for t in (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT32))

# Chunk c of row r stands at place c XOR (r mod 8): for eight rows of eight chunks, its own inverse.
_SWIZZLE = np.array(
    [r * _CHUNKS + (c ^ r) for r in range(_ATOM) for c in range(_CHUNKS)], dtype=np.int64
)
# Where the scale of each of sixteen rows stands, and which row's scale stands at each place.
_PLACES = np.array([(r & 6) << 1 | (r & 8) >> 2 | (r & 1) for r in range(_ROWS)], dtype=np.int64)
_ROW_AT = np.argsort(_PLACES)

ROWS_INPUTS = ("x", "shift", "scale")
PRODUCT_INPUTS = (
    "x",
    "token_scale",
    "token_sum",
    "token_zero",
    "w",
    "channel_scale",
    "channel_zero",
    "channel_sum",
    "multiplier",
    "bias",
    "residual",
    "gate",
)
WEIGHT_ONLY_INPUTS = ("x", "w", "channel_scale", "channel_zero", "bias")


def function_of(variant: Variant) -> ir.Function:
    """The function of a plugin, by the plugin's name."""
    if isinstance(variant, RowsVariant):
        return _rows(variant)
    if isinstance(variant, ProductVariant):
        return _product(variant)
    return _weight_only(variant)


def _rows(variant: RowsVariant) -> ir.Function:
    """x [..., K] → values int8 [P, M', 128], scale [G', M'], zero, sums.

    Attributes: width K, group, steps (127 at 8 bits; asymmetric 255), segment. What a variant does
    not have is one zero. Integers and scales equal `calibrate.quantizers` to the bit.
    """
    body = Body(ROWS_INPUTS)
    width, group = body.number("width"), body.number("group")
    flat = body.op("Cast", body["x"], to=_FLOAT)
    flat = body.op("Reshape", flat, body.sizes(-1, width))
    count = body.op("Shape", flat, start=0, end=1)
    missing = body.op("Sub", body.rounded_up(count, _ROWS), count)
    flat = body.op("Pad", flat, body.sizes(0, 0, missing, 0))
    groups = body.op("Div", width, group)
    grouped = body.op("Reshape", flat, body.sizes(-1, groups, group))
    stored, scale, zero = (_asymmetric if variant.asymmetric else _symmetric)(body, flat, grouped)
    panels = body.ceiling(width, PANEL)
    padded_width = body.op("Mul", panels, body.ints(PANEL))
    stored = _with_columns(body, stored, width, padded_width)
    nothing = body.op("Constant", value_floats=[0.0])
    padded_groups = body.ceiling(padded_width, group)
    outputs = [
        _to_panels(body, stored, panels),
        _by_group(body, _with_columns(body, scale, groups, padded_groups)),
        _by_group(body, _with_columns(body, zero, groups, padded_groups))
        if zero is not None
        else body.op("Identity", nothing),
        _by_group(body, _sums(body, stored)) if variant.sums else body.op("Identity", nothing),
    ]
    return body.function(NAMESPACE, variant.name, outputs)


def _symmetric(
    body: Body, flat: ir.Value, grouped: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    largest = body.op("ReduceMax", body.op("Abs", grouped), body.ints(-1), keepdims=0)
    scale = _scale(body, largest)
    integers = body.op(
        "QuantizeLinear", flat, scale, axis=1, block_size=body.ref("group"), output_dtype=_INT8
    )
    return integers, scale, None


def _asymmetric(
    body: Body, flat: ir.Value, grouped: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Integers and zero points are stored less half their range, so that they fit INT8."""
    nothing = body.op("Constant", value_float=0.0)
    low = body.op("Min", body.op("ReduceMin", grouped, body.ints(-1), keepdims=0), nothing)
    high = body.op("Max", body.op("ReduceMax", grouped, body.ints(-1), keepdims=0), nothing)
    scale, steps = _scale(body, body.op("Sub", high, low)), body.real("steps")
    zero = body.op("Neg", body.op("Round", body.op("Div", low, scale)))
    zero = body.op("Clip", zero, nothing, steps)
    point = body.op("Cast", zero, to=_UINT8)
    integers = body.op("QuantizeLinear", flat, scale, point, axis=1, block_size=body.ref("group"))
    half = body.op(
        "Div",
        body.op("Add", steps, body.op("Constant", value_float=1.0)),
        body.op("Constant", value_float=2.0),
    )
    clipped = body.op("Min", body.op("Cast", integers, to=_FLOAT), steps)
    stored = body.op("Cast", body.op("Sub", clipped, half), to=_INT8)
    return stored, scale, body.op("Sub", zero, half)


def _scale(body: Body, span: ir.Value) -> ir.Value:
    least = body.op("Constant", value_float=MIN_SCALE)
    return body.op("Max", body.op("Div", span, body.real("steps")), least)


def _sums(body: Body, stored: ir.Value) -> ir.Value:
    """Σ of stored integers by segment: [M', S]."""
    segment = body.number("segment")
    wide = body.op("Cast", stored, to=_FLOAT)
    parts = body.op("Reshape", wide, body.sizes(0, -1, segment))
    return body.op("ReduceSum", parts, body.ints(-1), keepdims=0)


def _product(variant: ProductVariant) -> ir.Function:
    """Quantized rows times a packed weight, plus the bias: [..., N] in float16.

    `residual` is the unquantized x [..., K], whose leading dimensions the output has. Attributes:
    width K, activation_group, weight_group.
    """
    body = Body(PRODUCT_INPUTS)
    width = body.number("width")
    leading = body.op("Shape", body["residual"], start=0, end=-1)
    count = body.op("ReduceProd", leading, body.ints(0), keepdims=1)
    zero = body["token_zero"] if variant.input_zero else None
    rows = _dequantized_rows(body, width, count, zero)
    matrix = _dequantized_weight(
        body, variant.bits, width, variant.weight_zero, variant.multipliers
    )
    return body.function(NAMESPACE, variant.name, [_multiplied(body, rows, matrix, leading)])


def _weight_only(variant: WeightOnlyVariant) -> ir.Function:
    """x [..., K] in float16 times a packed weight, plus the bias: [..., N] in float16."""
    body = Body(WEIGHT_ONLY_INPUTS)
    width = body.number("width")
    leading = body.op("Shape", body["x"], start=0, end=-1)
    rows = body.op("Reshape", body.op("Cast", body["x"], to=_FLOAT), body.sizes(-1, width))
    matrix = _dequantized_weight(body, variant.bits, width, variant.weight_zero, False)
    return body.function(NAMESPACE, variant.name, [_multiplied(body, rows, matrix, leading)])


def _multiplied(body: Body, rows: ir.Value, matrix: ir.Value, leading: ir.Value) -> ir.Value:
    """rows [M, K] · matrix [N, K]ᵀ + bias, rounded to float16 once."""
    product = body.op("MatMul", rows, body.op("Transpose", matrix, perm=[1, 0]))
    biased = body.op("Add", product, body.op("Cast", body["bias"], to=_FLOAT))
    shape = body.sizes(leading, body.op("Shape", body["bias"]))
    return body.op("Reshape", body.op("Cast", biased, to=_HALF), shape)


def _dequantized_rows(
    body: Body, width: ir.Value, count: ir.Value, zero: ir.Value | None
) -> ir.Value:
    """[M, K] in float32."""
    group = body.number("activation_group")
    groups = body.op("Div", width, group)
    stored = body.head(_from_panels(body, body["x"], width), count, 0)
    grouped = body.op("Cast", stored, to=_FLOAT)
    grouped = body.op("Reshape", grouped, body.sizes(-1, groups, group))

    def by_row(values: ir.Value) -> ir.Value:
        return body.op("Unsqueeze", _from_groups(body, values, count, groups), body.ints(-1))

    if zero is not None:
        grouped = body.op("Sub", grouped, by_row(zero))
    restored = body.op("Mul", grouped, by_row(body["token_scale"]))
    return body.op("Reshape", restored, body.sizes(-1, width))


def _dequantized_weight(
    body: Body, bits: int, width: ir.Value, has_zero: bool, has_multipliers: bool
) -> ir.Value:
    """[N, K] in float32; the bias tells N."""
    group = body.number("weight_group")
    groups = body.op("Div", width, group)
    channels = body.op("Shape", body["bias"])
    decoded = (
        _from_fragments(body, body["w"], width)
        if bits == 4
        else _from_panels(body, body["w"], width)
    )
    grouped = body.op("Cast", body.head(decoded, channels, 0), to=_FLOAT)
    grouped = body.op("Reshape", grouped, body.sizes(channels, groups, group))

    def by_channel(values: ir.Value) -> ir.Value:
        """[G', N'] or [1, N'] → [N, G, 1] or [N, 1, 1]."""
        kept = body.head(body.head(values, groups, 0), channels, 1)
        return body.op("Unsqueeze", body.op("Transpose", kept, perm=[1, 0]), body.ints(-1))

    if has_zero:
        grouped = body.op("Sub", grouped, by_channel(body["channel_zero"]))
    factor = by_channel(body["channel_scale"])
    if has_multipliers:
        multiplier = body.op("Cast", body["multiplier"], to=_FLOAT)
        factor = body.op("Mul", factor, by_channel(multiplier))
    restored = body.op("Mul", grouped, factor)
    return body.op("Reshape", restored, body.sizes(channels, width))


def _with_columns(body: Body, value: ir.Value, have: ir.Value, want: ir.Value) -> ir.Value:
    """Zero columns after the ones that there are."""
    return body.op("Pad", value, body.sizes(0, 0, 0, body.op("Sub", want, have)))


def _to_panels(body: Body, stored: ir.Value, panels: ir.Value) -> ir.Value:
    """[M', 128 P] → [P, M', 128]."""
    apart = body.op("Reshape", stored, body.sizes(-1, panels, PANEL))
    whole = body.op("Transpose", apart, perm=[1, 0, 2])
    return _swizzled(body, whole, panels)


def _from_panels(body: Body, value: ir.Value, width: ir.Value) -> ir.Value:
    """[P, R, 128] → [R, K]."""
    panels = body.ceiling(width, PANEL)
    apart = body.op("Transpose", _swizzled(body, value, panels), perm=[1, 0, 2])
    together = body.op("Mul", panels, body.ints(PANEL))
    return body.head(body.op("Reshape", apart, body.sizes(-1, together)), width, 1)


def _swizzled(body: Body, value: ir.Value, panels: ir.Value) -> ir.Value:
    chunks = body.op("Reshape", value, body.sizes(panels, -1, _ATOM * _CHUNKS, _CHUNK))
    moved = body.op("Gather", chunks, body.table(_SWIZZLE), axis=2)
    return body.op("Reshape", moved, body.sizes(panels, -1, PANEL))


def _by_group(body: Body, values: ir.Value) -> ir.Value:
    """[M', G] → [G, M'], sixteen rows each in the kernels' order."""
    groups = body.op("Shape", values, start=1, end=2)
    sixteens = body.op(
        "Reshape", body.op("Transpose", values, perm=[1, 0]), body.sizes(groups, -1, _ROWS)
    )
    ordered = body.op("Gather", sixteens, body.table(_ROW_AT), axis=2)
    return body.op("Reshape", ordered, body.sizes(groups, -1))


def _from_groups(body: Body, values: ir.Value, count: ir.Value, groups: ir.Value) -> ir.Value:
    """[G', M'] in the kernels' order → [M, G]."""
    rows = body.op("Shape", values, start=0, end=1)
    sixteens = body.op("Reshape", values, body.sizes(rows, -1, _ROWS))
    ordered = body.op("Gather", sixteens, body.table(_PLACES), axis=2)
    by_row = body.op("Transpose", body.op("Reshape", ordered, body.sizes(rows, -1)), perm=[1, 0])
    return body.head(body.head(by_row, count, 0), groups, 1)


def _from_fragments(body: Body, value: ir.Value, width: ir.Value) -> ir.Value:
    """INT8 [P, N'/64, 4096] of two nibbles each → INT32 [N', K].

    A byte's place is (pair of steps, warp, row, quad, step and part, i); its low nibble belongs to
    channel 16 warp + row, its high one to the channel 8 further on.
    """
    panels = body.ceiling(width, PANEL)
    together = body.op("Mul", panels, body.ints(PANEL))
    sixteen, eight = (body.table(np.array(n, np.int32)) for n in (16, 8))
    whole = body.op("Cast", value, to=_INT32)
    unsigned = body.op("Mod", whole, body.table(np.array(256, np.int32)))

    def channels(nibble: ir.Value) -> ir.Value:
        """[slab · warp, 1, row, K']."""
        signed = body.op("Sub", body.op("Mod", body.op("Add", nibble, eight), sixteen), eight)
        axes = body.op("Reshape", signed, body.sizes(panels, -1, 2, 4, 8, 4, 4, 4))
        by_channel = body.op("Transpose", axes, perm=[1, 3, 4, 0, 2, 6, 5, 7])
        rows = body.op("Reshape", by_channel, body.sizes(-1, 8, together))
        return body.op("Unsqueeze", rows, body.ints(1))

    low = channels(body.op("Mod", unsigned, sixteen))
    high = channels(body.op("Div", unsigned, sixteen))
    both = body.op("Concat", low, high, axis=1)
    return body.head(body.op("Reshape", both, body.sizes(-1, together)), width, 1)
