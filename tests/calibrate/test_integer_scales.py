"""Integer scales against a brute-force float64 choice, and the properties that make them int8."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qdit.calibrate.integer_scales import (
    CHANNEL_SCALE_BITS,
    DIVISORS,
    choose_channel_scale,
    choose_multipliers,
    is_channel_scale,
    round_channel_scale,
)
from qdit.calibrate.integers import MIN_SCALE
from qdit.calibrate.quantizers import (
    QuantizedWeight,
    quantize_weight_mse,
    quantize_weight_nearest,
)
from qdit.calibrate.schemes import INTEGER_SCALE_BITS, LayerScheme, ScaleDtype

ALL_BITS = pytest.mark.parametrize("bits", INTEGER_SCALE_BITS, ids=lambda bits: f"w{bits}")
BOTH_DTYPES = pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
CLIPPED = pytest.mark.parametrize("clipped", [False, True], ids=["full range", "clipped"])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uneven(n: int, groups: int, size: int, seed: int = 0) -> Tensor:
    """Weights [N, G, g] whose groups differ in width by up to e² within a channel."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.exp(2 * torch.rand(n, groups, 1, generator=generator))
    return 0.01 * width * torch.randn(n, groups, size, generator=generator)


def scheme_of(bits: int, group: int = 32, scale_dtype: ScaleDtype = "float16") -> LayerScheme:
    return LayerScheme(bits, 8, group, "token", scale_dtype=scale_dtype, scale_format="integer")


def error_of(group: np.ndarray, scale: float, bits: int, importance: np.ndarray) -> float:
    """The weighted squared error of one group in float64."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    q = np.clip(np.rint(group / scale), low, high)
    return float((importance * (q * scale - group) ** 2).sum())


def best_error(
    group: np.ndarray, channel: float, bits: int, importance: np.ndarray, clipped: bool
) -> float:
    """The least error over the multipliers that may be tried, by brute force."""
    ratio = np.abs(group).max() / (2 ** (bits - 1) - 1) / channel
    tried = range(1, 17) if clipped else {np.floor(ratio), np.ceil(ratio)}
    multipliers = {min(max(int(m), 1), 16) for m in tried}
    return min(error_of(group, channel * m, bits, importance) for m in multipliers)


@ALL_BITS
@CLIPPED
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "by importance"])
def test_multipliers_leave_the_least_error(bits: int, clipped: bool, weighted: bool) -> None:
    groups = uneven(6, 5, 32, seed=bits).double()
    importance = torch.rand(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scheme = scheme_of(bits)
    channel = groups.abs().amax((1, 2), keepdim=True).squeeze(-1) / (2 ** (bits - 1) - 1) / 13
    found = choose_multipliers(
        groups, channel, scheme, clipped=clipped, importance=importance if weighted else None
    )
    assert torch.equal(found, found.round())
    assert found.min() >= 1 and found.max() <= 16
    weights = importance.numpy() if weighted else np.ones((5, 32))
    for n, g in itertools.product(range(6), range(5)):
        scale = (channel[n, 0] * found[n, g]).item()
        own = error_of(groups[n, g].numpy(), scale, bits, weights[g])
        best = best_error(groups[n, g].numpy(), channel[n, 0].item(), bits, weights[g], clipped)
        # both sum 32 squares in float64
        assert own <= best * (1 + 32 * 2.0**-52)


@ALL_BITS
@CLIPPED
@BOTH_DTYPES
def test_the_channels_scale_is_the_best_of_its_divisors(
    bits: int, clipped: bool, scale_dtype: ScaleDtype
) -> None:
    groups = uneven(6, 5, 32, seed=10 + bits).double()
    scheme = scheme_of(bits, scale_dtype=scale_dtype)
    found = choose_channel_scale(groups, scheme, clipped=clipped)
    assert torch.equal(found, round_channel_scale(found, scale_dtype))
    even = np.ones(32)
    for n in range(6):
        largest = groups[n].abs().max().item() / (2 ** (bits - 1) - 1)
        totals = {}
        for divisor in range(8, 17):
            wanted = torch.tensor(largest / divisor, dtype=torch.float64)
            channel = round_channel_scale(wanted, scale_dtype).item()
            totals[channel] = sum(
                best_error(group.numpy(), channel, bits, even, clipped) for group in groups[n]
            )
        assert found[n].item() in totals
        assert totals[found[n].item()] <= min(totals.values()) * (1 + 200 * 2.0**-52)


def test_divisors_below_the_half_would_repeat_those_above_it() -> None:
    # every multiple 1 … 16 of largest/d, up to the largest itself, is one of largest/(2d) as well
    for divisor in range(1, min(DIVISORS)):
        double = next(2**i * divisor for i in range(5) if 2**i * divisor in DIVISORS)
        multiples = {Fraction(m, divisor) for m in range(1, divisor + 1)}
        assert multiples <= {Fraction(m, double) for m in range(1, 17)}


@pytest.mark.parametrize("part", ["zero", "one"])
def test_inputs_of_no_importance_do_not_count(part: str) -> None:
    groups = uneven(4, 3, 32)
    importance = torch.ones(3, 32)
    if part == "zero":
        importance[:, 5:] = 0
        without = torch.zeros_like(groups)
        without[..., :5] = groups[..., :5]
        # the range is that of all weights: put the largest where it does not count
        groups[..., 9] = without[..., 9] = groups.abs().amax(-1)
        importance[:, 9] = 0
        channel = groups.abs().amax((1, 2), keepdim=True).squeeze(-1) / 7 / 16
        found, expected = (
            choose_multipliers(each, channel, scheme_of(4), clipped=True, importance=importance)
            for each in (groups, without)
        )
    else:
        found = choose_channel_scale(groups, scheme_of(4), importance=importance)
        expected = choose_channel_scale(groups, scheme_of(4))
    assert torch.equal(found, expected)


# Scales as weights have them: from the smallest that is stored to 2^10.
SCALES = st.floats(MIN_SCALE, 1024.0, width=32)


@settings(max_examples=200, deadline=None)
@given(SCALES, st.sampled_from(["float16", "float32"]))
def test_every_multiple_is_exact_in_float32(scale: float, dtype: ScaleDtype) -> None:
    stored = round_channel_scale(torch.tensor([scale]), dtype)
    assert is_channel_scale(stored)
    multiples = torch.arange(1, 17) * stored
    assert torch.equal(multiples.double(), torch.arange(1, 17).double() * stored.double())
    # and so a weight is the same number in whichever order a runtime multiplies
    for q in range(-8, 8):
        assert torch.equal(q * multiples, stored * (q * torch.arange(1, 17)).to(torch.int8))


@settings(max_examples=200, deadline=None)
@given(SCALES)
def test_float32_scales_are_rounded_to_the_nearest_of_20_bits(scale: float) -> None:
    exact = Fraction(scale)
    exponent = np.frexp(scale)[1]  # scale = f·2^exponent with f in [1/2, 1)
    step = Fraction(2) ** (int(exponent) - CHANNEL_SCALE_BITS)
    stored = Fraction(round_channel_scale(torch.tensor([scale]), "float32").item())
    assert (stored / step).denominator == 1
    assert abs(stored - exact) <= step / 2


# 1 + k·2^-20 lies half-way between two neighbours of 20 bits, which are 2^-19 apart there
@pytest.mark.parametrize(("given_", "stored"), [(1, 0), (3, 4), (5, 4), (2, 2)], ids=str)
def test_ties_go_to_the_even_neighbour(given_: int, stored: int) -> None:
    scale = torch.tensor([1 + given_ * 2.0**-20])
    assert round_channel_scale(scale, "float32").item() == 1 + stored * 2.0**-20


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (1 + 2.0**-19, True),
        (1 + 2.0**-20, False),
        (2.0**123, True),
        (2.0**124, False),  # 16 times it is 2^128
        (65504.0, True),
    ],
    ids=["20 bits", "21 bits", "16 times finite", "16 times infinite", "float16's largest"],
)
def test_which_scales_have_exact_multiples(scale: float, expected: bool) -> None:
    assert is_channel_scale(torch.tensor([0.5, scale])) is expected


def test_float16_scales_of_any_value_have_exact_multiples() -> None:
    every = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16)  # positive and finite
    assert is_channel_scale(every)


@ALL_BITS
@BOTH_DTYPES
@pytest.mark.parametrize("method", [quantize_weight_nearest, quantize_weight_mse])
def test_representable_weights_come_back_exactly(
    bits: int, scale_dtype: ScaleDtype, method: object
) -> None:
    generator = torch.Generator().manual_seed(bits)
    largest = 2 ** (bits - 1) - 1
    q = torch.randint(-largest, largest + 1, (12, 6, 32), generator=generator)
    q[..., 0] = largest  # −2^(b−1) lies outside the range that max|w| spans
    m = torch.randint(1, 17, (12, 6, 1), generator=generator)
    s = (torch.rand(12, 1, 1, generator=generator) + 0.5).half().float()
    weight = (s * (m * q)).reshape(12, 192)
    found = method(weight, scheme_of(bits, scale_dtype=scale_dtype))  # type: ignore[operator]
    assert torch.equal(found.dequantize(), weight)
    assert torch.equal(found.values.reshape(12, 6, 32), q.to(torch.int8))
    assert torch.equal(found.scale, (s * m).squeeze(-1))


@ALL_BITS
@BOTH_DTYPES
@pytest.mark.parametrize("method", [quantize_weight_nearest, quantize_weight_mse])
def test_the_weight_is_int8_with_one_scale_a_channel(
    bits: int, scale_dtype: ScaleDtype, method: object
) -> None:
    weight = uneven(16, 6, 32, seed=bits).flatten(1)
    found: QuantizedWeight = method(weight, scheme_of(bits, scale_dtype=scale_dtype))  # type: ignore[operator]
    assert found.multiplier is not None
    assert found.multiplier.dtype == torch.uint8
    assert found.multiplier.min() >= 1 and found.multiplier.max() <= 16
    assert torch.equal(found.channel_scale * found.multiplier, found.scale)
    assert torch.equal(found.channel_scale, round_channel_scale(found.channel_scale, scale_dtype))
    products = found.values.int().reshape(16, 6, 32) * found.multiplier.int().unsqueeze(-1)
    assert products.min() >= -128 and products.max() <= 127
    assert torch.equal(found.int8_values().int(), products.reshape(16, 192))
    assert torch.equal(found.int8_values() * found.channel_scale, found.dequantize())


def test_int8_holds_the_extreme_products() -> None:
    values = torch.tensor([[-8, 7, -8, 7]], dtype=torch.int8)
    multiplier = torch.tensor([[16, 1]], dtype=torch.uint8)
    weight = QuantizedWeight(values, 0.5 * multiplier.float(), None, 4, multiplier)
    # −8·16, 7·16, −8·1, 7·1
    assert weight.int8_values().tolist() == [[-128, 112, -8, 7]]
    assert weight.channel_scale.tolist() == [[0.5]]


def test_equal_multipliers_are_one_scale_a_channel() -> None:
    values = torch.randint(-8, 8, (5, 96), generator=torch.Generator().manual_seed(0))
    channel = torch.rand(5, 1, generator=torch.Generator().manual_seed(1)).half().float()
    multiplier = torch.full((5, 3), 11, dtype=torch.uint8)
    grouped = QuantizedWeight(values.to(torch.int8), channel * multiplier, None, 4, multiplier)
    whole = QuantizedWeight(values.to(torch.int8), 11 * channel, None, 4)
    assert torch.equal(grouped.dequantize(), whole.dequantize())


def test_groups_may_change_places() -> None:
    groups = uneven(8, 6, 32)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    found = quantize_weight_nearest(groups.flatten(1), scheme_of(4))
    moved = quantize_weight_nearest(groups[:, order].flatten(1), scheme_of(4))
    assert torch.equal(moved.scale, found.scale[:, order])
    assert torch.equal(moved.values.view(8, 6, 32), found.values.view(8, 6, 32)[:, order])


def test_channels_do_not_see_one_another() -> None:
    groups = uneven(8, 6, 32)
    whole = choose_channel_scale(groups, scheme_of(4))
    assert torch.equal(whole[2:5], choose_channel_scale(groups[2:5], scheme_of(4)))


def test_scaling_a_weight_by_a_power_of_two_scales_its_channels() -> None:
    weight = uneven(8, 6, 32).flatten(1)
    plain, scaled = (quantize_weight_nearest(c * weight, scheme_of(4)) for c in (1.0, 4.0))
    assert torch.equal(plain.values, scaled.values)
    assert plain.multiplier is not None and scaled.multiplier is not None
    assert torch.equal(plain.multiplier, scaled.multiplier)
    assert torch.equal(4 * plain.channel_scale, scaled.channel_scale)


def test_weights_whose_squares_overflow_still_have_scales() -> None:
    weight = 1e25 * uneven(4, 3, 32).flatten(1)  # their squared errors are infinite in float32
    found = quantize_weight_nearest(weight, scheme_of(4, scale_dtype="float32"))
    assert found.scale.isfinite().all()
    wide = weight.double()
    assert (found.dequantize(torch.float64) - wide).norm() < 0.2 * wide.norm()


@pytest.mark.parametrize("method", [quantize_weight_nearest, quantize_weight_mse])
def test_zeros_stay_zero(method: object) -> None:
    weight = uneven(4, 3, 32)
    weight[0] = 0  # a whole channel
    weight[1, 1] = 0  # a group
    found: QuantizedWeight = method(weight.flatten(1), scheme_of(4))  # type: ignore[operator]
    restored = found.dequantize().view(4, 3, 32)
    assert (restored[0] == 0).all() and (restored[1, 1] == 0).all()
    assert (found.channel_scale >= MIN_SCALE).all()
    assert restored.isfinite().all()


@ALL_BITS
@pytest.mark.parametrize("group", [32, 64, 128])
def test_searching_all_multipliers_is_never_worse(bits: int, group: int) -> None:
    # under one channel scale: the two neighbours are among the sixteen
    groups = uneven(16, 4, group, seed=bits)
    channel = choose_channel_scale(groups, scheme_of(bits, group))
    errors = []
    for clipped in (False, True):
        m = choose_multipliers(groups, channel, scheme_of(bits, group), clipped=clipped)
        scale = (channel * m).unsqueeze(-1)
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        restored = (groups / scale).round().clamp(low, high) * scale
        errors.append((restored - groups).double().square().sum(-1))
    # float32 sums of g squares were compared
    assert (errors[1] <= errors[0] * (1 + group * 2.0**-24)).all()


@ALL_BITS
@pytest.mark.parametrize("group", [32, 128])
def test_the_error_of_a_matrix_is_that_of_float_scales(bits: int, group: int) -> None:
    """Rounding a scale of m ≥ 8 to one of its two neighbours changes it by 1/16 at most, and the
    squared error with its square; choosing between them gains more than that."""
    weight = uneven(64, 768 // group, group, seed=bits).flatten(1)
    scheme = scheme_of(bits, group)
    errors = [
        (quantize_weight_nearest(weight, each).dequantize() - weight).double().norm()
        for each in (scheme, scheme.with_float_scales())
    ]
    assert errors[0] < 1.01 * errors[1]
