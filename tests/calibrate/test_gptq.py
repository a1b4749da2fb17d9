"""GPTQ against a plain float64 statement of the algorithm: column by column, explicit inverse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qdit.calibrate.column_loop import ColumnLoops
from qdit.calibrate.gptq import (
    GptqSettings,
    Order,
    block_spans,
    factor_for,
    gptq,
    solve,
    solve_groups,
)
from qdit.calibrate.quantizers import best_clipping, quantize_weight_mse, quantize_weight_nearest
from qdit.calibrate.schemes import LayerScheme
from qdit.errors import InputError


def correlated_inputs(rows: int, k: int, seed: int = 0) -> Tensor:
    """Float64 inputs [rows, K] with strong, decaying correlations between neighbours."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator, dtype=torch.float64)
    mixing = torch.randn(k, k, generator=generator, dtype=torch.float64) / k**0.5
    return x @ mixing + 0.3 * x.roll(1, 1)


def hessian_of(x: Tensor) -> Tensor:
    return 2.0 / x.shape[0] * x.T @ x


def weight_of(n: int, k: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator, dtype=torch.float64) / k**0.5


def range_of(group: Tensor, scheme: LayerScheme, clipped: bool) -> tuple[Tensor, Tensor]:
    """s and Z [N] by the paper's formulae."""
    low, high = group.amin(1), group.amax(1)
    if clipped:
        low, high = (side.flatten() for side in best_clipping(group.unsqueeze(1), scheme))
    low, high = low.clamp(max=0), high.clamp(min=0)
    bits = scheme.weight_bits
    if scheme.weight_symmetric:
        scale = torch.maximum(-low, high) / (2 ** (bits - 1) - 1)
    else:
        scale = (high - low) / (2**bits - 1)
    if scheme.scale_dtype == "float16":
        scale = scale.half().double()
    zero = torch.zeros_like(scale) if scheme.weight_symmetric else -torch.round(low / scale)
    return scale, zero


def rounded_channel(scale: Tensor, scheme: LayerScheme) -> Tensor:
    """Stored scales: float16, or float32 cut to 20 bits."""
    if scheme.scale_dtype == "float16":
        return scale.half().double()
    exponent = scale.log2().floor()
    return torch.round(scale / 2 ** (exponent - 19)) * 2 ** (exponent - 19)


def multipliers_of(
    group: Tensor, channel: Tensor, importance: Tensor, scheme: LayerScheme, clipped: bool
) -> tuple[Tensor, Tensor]:
    """m [N] of least weighted squared error for one group [N, g], and that error [N]."""
    bits = scheme.weight_bits
    ratio = group.abs().amax(1) / (2 ** (bits - 1) - 1) / channel
    tried = [torch.full_like(ratio, m) for m in range(1, 17)]
    if not clipped:
        tried = [ratio.floor().clamp(1, 16), ratio.ceil().clamp(1, 16)]
    errors = []
    for m in tried:
        scale = (channel * m)[:, None]
        q = torch.round(group / scale).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        errors.append((importance * (q * scale - group) ** 2).sum(1))
    least, place = torch.stack(errors).min(0)
    return torch.stack(tried).gather(0, place[None])[0], least


def channel_of(weight: Tensor, importance: Tensor, scheme: LayerScheme, clipped: bool) -> Tensor:
    """s [N] of least weighted squared error among the largest float scale over 8 … 16."""
    group = scheme.weight_group_size(weight.shape[1])
    largest = weight.abs().amax(1) / (2 ** (scheme.weight_bits - 1) - 1)
    tried, errors = [], []
    for divisor in range(8, 17):
        channel = rounded_channel(largest / divisor, scheme)
        parts = zip(weight.split(group, 1), importance.split(group), strict=True)
        tried.append(channel)
        errors.append(
            sum(multipliers_of(one, channel, own, scheme, clipped)[1] for one, own in parts)
        )
    place = torch.stack(errors).argmin(0)
    return torch.stack(tried).gather(0, place[None])[0]


def importance_of(inverse: Tensor, columns: list[int]) -> Tensor:
    """What a unit error of each column costs at its turn, the columns before it eliminated."""
    importance, inverse = torch.zeros(len(columns), dtype=torch.float64), inverse.clone()
    for i in columns:
        importance[i] = 1 / inverse[i, i]
        inverse -= torch.outer(inverse[:, i], inverse[i, :]) / inverse[i, i]
    return importance


def textbook(
    weight: Tensor,
    hessian: Tensor,
    scheme: LayerScheme,
    order: Order,
    damping: float = 0.01,
    clipped: bool = False,
) -> Tensor:
    """Optimal brain quantization in a fixed column order: after each column its row and column are
    eliminated from the inverse Hessian. Returns Ŵ [N, K] in float64."""
    weight, hessian = weight.clone(), hessian.clone()
    n, k = weight.shape
    columns = list(range(k))
    if order == "activation":
        columns.sort(key=lambda i: -hessian[i, i].item())
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian += damping * hessian.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    inverse = torch.linalg.inv(hessian)
    importance = importance_of(inverse, columns)
    group = scheme.weight_group_size(k)
    channel = channel_of(weight, importance, scheme, clipped) if scheme.has_integer_scales else None

    def scales(start: int) -> tuple[Tensor, Tensor]:
        part = weight[:, start : start + group]
        if channel is None:
            return range_of(part, scheme, clipped)
        own = importance[start : start + group]
        m, _ = multipliers_of(part, channel, own, scheme, clipped)
        return channel * m, torch.zeros_like(m)

    ranges = [scales(start) for start in range(0, k, group)]
    bits = scheme.weight_bits
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    if not scheme.weight_symmetric:
        low, high = 0, 2**bits - 1
    restored = torch.zeros(n, k, dtype=torch.float64)
    for position, i in enumerate(columns):
        if order == "natural" and i % group == 0:
            ranges[i // group] = scales(i)
        scale, zero = ranges[i // group]
        q = (torch.round(weight[:, i] / scale) + zero).clamp(low, high)
        restored[:, i] = scale * (q - zero)
        error = (weight[:, i] - restored[:, i]) / inverse[i, i]
        rest = columns[position + 1 :]
        weight[:, rest] -= error[:, None] * inverse[i, rest][None, :]
        inverse = inverse - torch.outer(inverse[:, i], inverse[i, :]) / inverse[i, i]
    return restored


def output_error(weight: Tensor, restored: Tensor, x: Tensor) -> float:
    return ((x @ (weight - restored).T).norm() / (x @ weight.T).norm()).item()


ORDERS = pytest.mark.parametrize("order", ["activation", "natural"])
CASES = [
    (256, 128),
    (192, 32),
    (192, 64),
    (192, 96),
    (288, 144),
    (384, 192),
    (576, 288),
    (320, "channel"),
]


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("k", "group"), CASES, ids=str)
@ORDERS
def test_equals_the_textbook_in_float64(
    k: int, group: int | str, symmetric: bool, order: Order
) -> None:
    x = correlated_inputs(700, k)
    weight, hessian = weight_of(24, k), hessian_of(x)
    scheme = LayerScheme(4, 8, group, weight_symmetric=symmetric)  # type: ignore[arg-type]
    ours = gptq(weight, hessian, scheme, order=order)
    expected = textbook(weight, hessian, scheme, order)
    torch.testing.assert_close(ours.dequantize(torch.float64), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
@pytest.mark.parametrize("clipped", [False, True], ids=["full range", "clipped"])
@pytest.mark.parametrize(("k", "group"), [(192, 32), (192, 96), (384, 192), (288, 144)], ids=str)
@ORDERS
def test_integer_scales_equal_the_textbook_in_float64(
    k: int, group: int, clipped: bool, scale_dtype: str, bits: int, order: Order
) -> None:
    # groups in the range of a block, and groups of several blocks; loud and quiet inputs
    x = correlated_inputs(500, k) * torch.logspace(0, 1, k, dtype=torch.float64)
    weight, hessian = weight_of(12, k), hessian_of(x)
    weight *= 1 + torch.arange(k) // group  # groups of different widths
    scheme = LayerScheme(bits, 8, group, scale_dtype=scale_dtype, scale_format="integer")  # type: ignore[arg-type]
    ours = gptq(weight, hessian, scheme, order=order, clipped=clipped)
    expected = textbook(weight, hessian, scheme, order, clipped=clipped)
    # every scale is exact in float32, so nothing is lost in storing it
    torch.testing.assert_close(ours.dequantize(torch.float64), expected, rtol=1e-9, atol=1e-12)
    assert ours.multiplier is not None
    assert torch.equal(ours.channel_scale * ours.multiplier, ours.scale)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
@ORDERS
def test_equals_the_textbook_at_every_width(bits: int, scale_dtype: str, order: Order) -> None:
    x = correlated_inputs(300, 192)
    weight, hessian = weight_of(16, 192), hessian_of(x)
    scheme = LayerScheme(bits, 8, 96, weight_symmetric=False, scale_dtype=scale_dtype)  # type: ignore[arg-type]
    ours = gptq(weight, hessian, scheme, clipped=True, order=order)
    expected = textbook(weight, hessian, scheme, order, clipped=True)
    # float32 scales are stored as such: relative rounding 2^-24
    torch.testing.assert_close(ours.dequantize(torch.float64), expected, rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("group", [64, 96, 288], ids=str)
def test_float32_is_as_good_as_float64(group: int) -> None:
    # A weight near a rounding boundary may fall on the other side in float32 and then moves all
    # later columns, so integers are not compared: the error that GPTQ minimizes is.
    x = correlated_inputs(700, 576)
    weight, hessian = weight_of(64, 576), hessian_of(x)
    scheme = LayerScheme(4, 8, group)
    single = gptq(weight.float(), hessian.float(), scheme).dequantize(torch.float64)
    double = gptq(weight, hessian, scheme).dequantize(torch.float64)
    found, best = output_error(weight, single, x), output_error(weight, double, x)
    assert found == pytest.approx(best, rel=0.01)
    assert (single != double).double().mean() < 0.01


@pytest.mark.parametrize("block_size", [32, 48, 100, 128, 1000], ids=str)
@pytest.mark.parametrize("group", [32, 96, 192, "channel"], ids=str)
@pytest.mark.parametrize(
    "fields",
    [{"weight_symmetric": False}, {"scale_format": "integer"}],
    ids=["float scales", "integer scales"],
)
@ORDERS
def test_block_size_changes_nothing(
    group: int | str, fields: dict, block_size: int, order: Order
) -> None:
    x = correlated_inputs(300, 192)
    weight, hessian = weight_of(16, 192), hessian_of(x)
    scheme = LayerScheme(3, 8, group, **fields)  # type: ignore[arg-type]
    ours = gptq(weight, hessian, scheme, block_size=block_size, order=order)
    plain = gptq(weight, hessian, scheme, block_size=64, order=order)
    assert torch.equal(ours.values, plain.values)
    assert torch.equal(ours.scale, plain.scale)


@pytest.mark.parametrize(
    "fields",
    [{}, {"weight_symmetric": False}, {"scale_format": "integer"}],
    ids=["symmetric", "asymmetric", "integer scales"],
)
@pytest.mark.parametrize("group", [32, 96, "channel"], ids=str)
def test_beats_round_to_nearest_and_mse_on_the_outputs(group: int | str, fields: dict) -> None:
    x = correlated_inputs(700, 192)
    weight = weight_of(32, 192)
    scheme = LayerScheme(4, 8, group, **fields)  # type: ignore[arg-type]
    restored = {
        "gptq": gptq(weight, hessian_of(x), scheme),
        "mse": quantize_weight_mse(weight, scheme),
        "nearest": quantize_weight_nearest(weight, scheme),
    }
    error = {
        key: output_error(weight, quantized.dequantize(torch.float64), x)
        for key, quantized in restored.items()
    }
    assert error["gptq"] < 0.9 * error["mse"]
    assert error["gptq"] < 0.8 * error["nearest"]


def test_uncorrelated_alike_inputs_give_round_to_nearest_with_integer_scales() -> None:
    # inputs of one size, so that every weight's error counts alike, as it does to nearest
    weight = weight_of(8, 96).float()
    scheme = LayerScheme(4, 8, 32, scale_format="integer")
    ours = gptq(weight, 0.5 * torch.eye(96), scheme)
    nearest = quantize_weight_nearest(weight, scheme)
    for name, tensor in nearest.tensors().items():
        assert torch.equal(ours.tensors()[name], tensor), name


def test_uncorrelated_inputs_give_round_to_nearest() -> None:
    # with a diagonal H no column's error can be made up for by another column
    weight = weight_of(8, 96).float()
    scheme = LayerScheme(4, 8, 32, weight_symmetric=False)
    hessian = torch.diag(torch.rand(96, generator=torch.Generator().manual_seed(3)) + 0.5)
    ours = gptq(weight, hessian, scheme, clipped=False)
    nearest = quantize_weight_nearest(weight, scheme)
    assert torch.equal(ours.values, nearest.values)
    assert torch.equal(ours.scale, nearest.scale)


def test_rows_do_not_influence_each_other() -> None:
    # what allows q, k and v to be solved together
    weight, hessian = weight_of(12, 128).float(), hessian_of(correlated_inputs(200, 128)).float()
    scheme = LayerScheme(4, 8, 64)
    together = gptq(weight, hessian, scheme)
    apart = [gptq(part, hessian, scheme) for part in weight.split(4)]
    assert torch.equal(together.values, torch.cat([part.values for part in apart]))
    assert torch.equal(together.scale, torch.cat([part.scale for part in apart]))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@ORDERS
def test_dead_inputs_get_zero_weights(symmetric: bool, order: Order) -> None:
    x = correlated_inputs(300, 96)
    x[:, [3, 40, 95]] = 0
    weight, scheme = weight_of(8, 96), LayerScheme(4, 8, 32, weight_symmetric=symmetric)
    restored = gptq(weight, hessian_of(x), scheme, order=order).dequantize(torch.float64)
    assert (restored[:, [3, 40, 95]] == 0).all()
    expected = textbook(weight, hessian_of(x), scheme, order)
    torch.testing.assert_close(restored, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("group", [32, 96, "channel"], ids=str)
def test_activation_order_lowers_the_error(group: int | str) -> None:
    # a few loud inputs, as in trained transformers
    x = correlated_inputs(700, 192) * torch.logspace(0, 1.5, 192, dtype=torch.float64)
    weight, scheme = weight_of(32, 192), LayerScheme(4, 8, group)  # type: ignore[arg-type]
    error = {
        order: output_error(
            weight,
            gptq(weight, hessian_of(x), scheme, order=order).dequantize(torch.float64),  # type: ignore[arg-type]
            x,
        )
        for order in ("activation", "natural")
    }
    assert error["activation"] < 0.9 * error["natural"]


def test_fewer_rows_than_inputs_still_factor() -> None:
    x = correlated_inputs(20, 192)
    weight = weight_of(8, 192)
    ours = gptq(weight.float(), hessian_of(x).float(), LayerScheme(4, 8, 64))
    nearest = quantize_weight_nearest(weight, LayerScheme(4, 8, 64))
    assert output_error(weight, ours.dequantize(torch.float64), x) < output_error(
        weight, nearest.dequantize(torch.float64), x
    )


def test_stored_scales_are_float16_values() -> None:
    ours = gptq(weight_of(8, 64).float(), torch.eye(64), LayerScheme(4, 8, 32))
    assert torch.equal(ours.scale, ours.scale.half().float())
    assert ours.values.dtype == torch.int8
    assert ours.zero_point is None


def test_sixteen_bit_weights_are_refused() -> None:
    with pytest.raises(InputError, match="weight bits below 16, got 16"):
        gptq(torch.zeros(4, 32), torch.eye(32), LayerScheme(16, 16))


@pytest.mark.parametrize(
    ("in_features", "group", "block_size", "expected"),
    [
        (256, 64, 128, [(0, 128), (128, 256)]),
        (288, 96, 128, [(0, 96), (96, 192), (192, 288)]),
        (160, 32, 128, [(0, 128), (128, 160)]),
        (384, 192, 128, [(0, 96), (96, 192), (192, 288), (288, 384)]),
        (257, 257, 128, [(0, 86), (86, 172), (172, 257)]),
    ],
    ids=["fits", "does not divide", "short last", "larger", "odd channel"],
)
def test_blocks_never_cross_a_group_border(
    in_features: int, group: int, block_size: int, expected: list[tuple[int, int]]
) -> None:
    assert block_spans(in_features, group, block_size) == expected


def test_a_group_that_does_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match="must divide the 576 input channels"):
        gptq(torch.zeros(4, 576), torch.eye(576), LayerScheme(4, 8, 128))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping": -0.1}, "damping must be 0 or more, got -0.1"),
        ({"damping": float("nan")}, "damping must be 0 or more, got nan"),
        ({"block_size": 0}, "block size must be at least 1, got 0"),
        ({"order": "random"}, "order must be activation or natural, got 'random'"),
    ],
    ids=["negative damping", "no damping", "no block", "unknown order"],
)
def test_senseless_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        GptqSettings(**settings)


@pytest.mark.parametrize("order", ["activation", "natural"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("clipped", [False, True], ids=["full range", "clipped"])
def test_stacked_group_sizes_equal_each_by_itself(
    order: Order, symmetric: bool, clipped: bool
) -> None:
    weight, hessian = weight_of(12, 128), hessian_of(correlated_inputs(300, 128))
    settings = GptqSettings(block_size=48, order=order, clipped=clipped)
    factor = factor_for(hessian, settings)
    groups: list[int | str] = [32, 64, "channel"]
    schemes = [LayerScheme(weight_group=g, weight_symmetric=symmetric) for g in groups]
    stacked = solve_groups(weight, factor, schemes, settings, ColumnLoops())
    for scheme, found in zip(schemes, stacked, strict=True):
        alone = solve(weight, factor, scheme, settings, ColumnLoops())
        assert torch.equal(found.values, alone.values)
        assert torch.equal(found.scale, alone.scale)
        if not symmetric:
            assert found.zero_point is not None
            assert alone.zero_point is not None
            assert torch.equal(found.zero_point, alone.zero_point)


@pytest.mark.parametrize("order", ["activation", "natural"])
def test_stacked_scale_formats_equal_each_by_itself(order: Order) -> None:
    weight, hessian = weight_of(12, 128), hessian_of(correlated_inputs(300, 128))
    settings = GptqSettings(block_size=48, order=order)
    factor = factor_for(hessian, settings)
    integer = LayerScheme(weight_group=32, scale_format="integer")
    schemes = [
        integer,
        integer.with_float_scales(),
        LayerScheme(weight_group=64, scale_format="integer"),
        LayerScheme(weight_group="channel"),
    ]
    stacked = solve_groups(weight, factor, schemes, settings, ColumnLoops())
    for scheme, found in zip(schemes, stacked, strict=True):
        alone = solve(weight, factor, scheme, settings, ColumnLoops())
        assert (found.multiplier is not None) == scheme.has_integer_scales
        assert found.tensors().keys() == alone.tensors().keys()
        for name, tensor in alone.tensors().items():
            assert torch.equal(found.tensors()[name], tensor), (scheme.label, name)


def test_schemes_that_differ_in_more_than_the_group_are_not_stacked() -> None:
    weight, hessian = weight_of(4, 64), hessian_of(correlated_inputs(200, 64))
    settings = GptqSettings()
    schemes = [LayerScheme(weight_bits=bits, weight_group=32) for bits in (4, 3)]
    with pytest.raises(ValueError, match="differ in weight group and scale format only"):
        solve_groups(weight, factor_for(hessian, settings), schemes, settings, ColumnLoops())
