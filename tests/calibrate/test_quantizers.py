"""Quantizers against float64 restatements of the formulae, and the properties they must have."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from qdit.calibrate.integers import IntegerRange, quantize
from qdit.calibrate.quantizers import (
    QuantizedWeight,
    best_clipping,
    fake_quantize_activation,
    quantize_activation,
    quantize_groups,
    quantize_weight_mse,
    quantize_weight_nearest,
    range_parameters,
)
from qdit.calibrate.schemes import ACTIVATION_BITS, WEIGHT_BITS, LayerScheme, ScaleDtype

BITS = WEIGHT_BITS[:-1]
BOTH = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
ALL_BITS = pytest.mark.parametrize("bits", BITS, ids=lambda bits: f"w{bits}")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scheme_of(bits: int, symmetric: bool, group: Any = 64, **fields: Any) -> LayerScheme:
    return LayerScheme(bits, 8, group, weight_symmetric=symmetric, **fields)


KINDS = pytest.mark.parametrize(
    "scheme",
    [scheme_of(4, True), scheme_of(4, False), scheme_of(4, True, scale_format="integer")],
    ids=["symmetric", "asymmetric", "integer scales"],
)


def reference(
    x: np.ndarray, bits: int, symmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """method.md's formulae in float64 for groups [..., g]: (q, s, Z, x/s)."""
    x = x.astype(np.float64)
    if symmetric:
        scale = np.abs(x).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
        zero = np.zeros_like(scale)
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    else:
        smallest = np.minimum(x.min(-1, keepdims=True), 0)
        largest = np.maximum(x.max(-1, keepdims=True), 0)
        scale = (largest - smallest) / (2**bits - 1)
        low, high = 0, 2**bits - 1
        zero = -np.rint(smallest / scale)
    ratio = x / scale
    return np.clip(np.rint(ratio) + zero, low, high), scale, zero, ratio


def away_from_ties(ratio: np.ndarray) -> np.ndarray:
    """Where float32 cannot round to the other side: x/s carries two roundings, 2·2^-24 relative."""
    return np.abs(ratio - np.floor(ratio) - 0.5) > 2 * 2.0**-24 * np.abs(ratio) + 1e-12


def error_of(weight: Tensor, quantized: QuantizedWeight) -> Tensor:
    """Squared error of each row in float64."""
    return (quantized.dequantize(torch.float64) - weight.double()).square().sum(-1)


@ALL_BITS
@BOTH
@pytest.mark.parametrize("group", [32, 96, "channel"])
def test_nearest_agrees_with_the_formulae_in_float64(
    bits: int, symmetric: bool, group: Any
) -> None:
    weight = normal(24, 192, seed=bits) + 0.3
    scheme = scheme_of(bits, symmetric, group, scale_dtype="float32")
    found = quantize_weight_nearest(weight, scheme)
    groups = weight.numpy().reshape(24, -1, scheme.weight_group_size(192))
    values, scale, zero, ratio = reference(groups, bits, symmetric)
    clear = away_from_ties(ratio)
    assert clear.mean() > 0.999
    assert np.array_equal(found.values.numpy().reshape(groups.shape)[clear], values[clear])
    # one division and one rounding: a relative error of 2^-23 at most
    assert np.allclose(found.scale.numpy(), scale[..., 0], rtol=2.0**-23, atol=0)
    if symmetric:
        assert found.zero_point is None
    else:
        assert np.array_equal(found.zero_point.numpy(), zero[..., 0])
    assert found.group_size == scheme.weight_group_size(192)


@pytest.mark.parametrize("bits", ACTIVATION_BITS[:-1], ids=lambda bits: f"a{bits}")
@BOTH
@pytest.mark.parametrize("group", [32, 96, "token"])
def test_activations_agree_with_the_formulae_in_float64(
    bits: int, symmetric: bool, group: Any
) -> None:
    x = 3 * normal(2, 5, 192, seed=bits)
    scheme = LayerScheme(4, bits, "channel", group, activation_symmetric=symmetric)
    size = scheme.activation_group_size(192)
    values, scale, zero = quantize_activation(x, scheme)
    expected, wide, offset, ratio = reference(x.numpy().reshape(2, 5, -1, size), bits, symmetric)
    clear = away_from_ties(ratio)
    assert clear.mean() > 0.999
    assert np.array_equal(values.numpy()[clear], expected[clear])
    assert np.allclose(scale.numpy(), wide, rtol=2.0**-23, atol=0)
    assert np.array_equal(zero.numpy(), offset)
    restored = fake_quantize_activation(x, scheme).numpy().reshape(expected.shape)
    # q − Z is exact, so one scale error and one product: 3·2^-24 relative
    assert np.allclose(restored[clear], ((expected - offset) * wide)[clear], rtol=2.0**-22, atol=0)


def peer_weight(weight: np.ndarray, bits: int, symmetric: bool) -> np.ndarray:
    """What github Juanerx/Q-DiT's weight quantizer computes ('max' method), restated in float32."""
    one = np.float32(1)
    if symmetric:
        largest = np.maximum(np.abs(weight).max(-1, keepdims=True), np.float32(1e-5))
        scale, base = largest / (one * (2 ** (bits - 1) - 1)), np.float32(0)
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    else:
        smallest, largest = weight.min(-1, keepdims=True), weight.max(-1, keepdims=True)
        scale = np.maximum(largest - smallest, np.float32(1e-5)) / (one * (2**bits - 1))
        low, high = 0, 2**bits - 1
        base = np.clip(np.rint(-smallest / scale), low, high)
    return (np.clip(np.rint(weight / scale) + base, low, high) - base) * scale


@ALL_BITS
@BOTH
def test_weights_agree_with_the_authors_code(bits: int, symmetric: bool) -> None:
    weight = normal(16, 256, seed=3)  # each group of 64 has both signs: not the zero-range fault
    found = quantize_weight_nearest(weight, scheme_of(bits, symmetric, scale_dtype="float32"))
    expected = peer_weight(weight.numpy().reshape(-1, 64), bits, symmetric).reshape(16, 256)
    assert np.allclose(found.dequantize().numpy(), expected, rtol=2.0**-22, atol=0)


def test_a_range_that_excludes_zero_is_extended_to_it() -> None:
    # the authors' code gives {1, 1, 1} for this group: Z = −round(5 / (1/15)) is clamped to 0,
    # and so are all q. Here s = 6/15 = 0.4, Z = 0, q = {12 (5/0.4 = 12.5, ties to even), 14, 15}
    x = torch.tensor([[5.0, 5.5, 6.0]])
    assert peer_weight(x.numpy(), 4, False) == pytest.approx(np.ones((1, 3)))
    scale, zero = range_parameters(x.amin(), x.amax(), 4, symmetric=False)
    values = quantize(x, scale, zero, IntegerRange.of(4, False))
    assert scale.item() == pytest.approx(0.4)
    assert zero.item() == 0
    assert values.tolist() == [[12, 14, 15]]
    assert ((values - zero) * scale).flatten().tolist() == pytest.approx([4.8, 5.6, 6.0])


@pytest.mark.parametrize("sign", [1, -1], ids=["all positive", "all negative"])
@ALL_BITS
def test_groups_of_one_sign_lose_no_more_than_half_a_step(bits: int, sign: int) -> None:
    weight = sign * (5 + normal(8, 64).abs())
    found = quantize_weight_nearest(weight, scheme_of(bits, False, scale_dtype="float32"))
    largest = (found.dequantize() - weight).abs().amax(-1)
    # the far end of the range is exact up to rounding of s: (2^b − 1)·2^-23·s
    assert (largest <= found.scale[:, 0] * (0.5 + 2.0**-14)).all()


def test_the_integers_are_those_of_onnx_quantizelinear() -> None:
    x = torch.cat([normal(4, 64), torch.tensor([[0.5, 1.5, -2.5, 300.0] * 16])])
    scheme = LayerScheme(4, 8, "channel", 32, activation_symmetric=True)
    values, scale, _ = quantize_activation(x, scheme)
    node = onnx.helper.make_node(
        "QuantizeLinear",
        ["x", "s"],
        ["q"],
        axis=1,
        block_size=32,
        output_dtype=onnx.TensorProto.INT8,
    )
    graph = onnx.helper.make_graph(
        [node],
        "quantize",
        [
            onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [5, 64]),
            onnx.helper.make_tensor_value_info("s", onnx.TensorProto.FLOAT, [5, 2]),
        ],
        [onnx.helper.make_tensor_value_info("q", onnx.TensorProto.INT8, [5, 64])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    feeds = {"x": x.numpy(), "s": scale.squeeze(-1).numpy()}
    expected = ReferenceEvaluator(model).run(None, feeds)[0]
    assert np.array_equal(values.reshape(5, 64).numpy(), expected)


@ALL_BITS
@BOTH
@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
def test_representable_weights_come_back_and_stay(
    bits: int, symmetric: bool, scale_dtype: ScaleDtype
) -> None:
    integers = IntegerRange.of(bits, symmetric)
    scheme = scheme_of(bits, symmetric, 32, scale_dtype=scale_dtype)
    generator = torch.Generator().manual_seed(bits)
    values = torch.randint(integers.low, integers.high + 1, (8, 64), generator=generator)
    ends = (-integers.high if symmetric else integers.low, integers.high)
    values.view(8, 2, 32)[..., 0], values.view(8, 2, 32)[..., 1] = ends
    zero = None if symmetric else torch.randint(0, integers.high + 1, (8, 2), generator=generator)
    # power-of-two scales: every product and every recomputed scale is exact
    scale = 2.0 ** torch.randint(-6, 3, (8, 2), generator=generator)
    given = QuantizedWeight(values, scale, zero, bits)
    if symmetric:
        # −2^(b−1) lies outside the range that max|x| spans; such a group gets a larger scale
        values.clamp_(min=-integers.high)
    weight = given.dequantize()
    found = quantize_weight_nearest(weight, scheme)
    assert torch.equal(found.dequantize(), weight)
    assert torch.equal(found.scale, scale)
    again = quantize_weight_nearest(found.dequantize(), scheme)
    assert torch.equal(again.values, found.values)


@pytest.mark.parametrize("bits", BITS[1:], ids=lambda bits: f"w{bits}")
def test_quantizing_twice_changes_nothing(bits: int) -> None:
    # symmetric, float32 scales: the largest magnitude is ±(2^(b−1) − 1)·s again, s moves by an ulp
    scheme = scheme_of(bits, True, scale_dtype="float32")
    once = quantize_weight_nearest(normal(16, 256), scheme)
    twice = quantize_weight_nearest(once.dequantize(), scheme)
    assert torch.equal(once.values, twice.values)
    assert torch.allclose(once.scale, twice.scale, rtol=2.0**-22, atol=0)


@BOTH
@pytest.mark.parametrize("method", [quantize_weight_nearest, quantize_weight_mse])
def test_all_zero_groups_stay_zero(symmetric: bool, method: Any) -> None:
    weight = normal(4, 128)
    weight[:, :64] = 0
    found = method(weight, scheme_of(4, symmetric))
    assert (found.dequantize()[:, :64] == 0).all()
    assert found.dequantize().isfinite().all()
    assert (found.scale > 0).all()
    x = fake_quantize_activation(weight, LayerScheme(4, 8, 64, 64, activation_symmetric=symmetric))
    assert (x[:, :64] == 0).all()
    assert x.isfinite().all()


@BOTH
def test_an_outlier_spoils_only_its_own_group(symmetric: bool) -> None:
    weight = normal(4, 256)
    spoiled = weight.clone()
    spoiled[1, 70] = 1000.0
    scheme = scheme_of(4, symmetric)
    plain, found = (quantize_weight_nearest(w, scheme) for w in (weight, spoiled))
    changed = (plain.dequantize() != found.dequantize()).view(4, 4, 64).any(-1)
    assert changed.nonzero().tolist() == [[1, 1]]
    step = found.scale[1, 1].item()
    assert step == pytest.approx(1000 / 7 if symmetric else 1000 / 15, rel=1e-2)
    assert found.dequantize()[1, 70].item() == pytest.approx(1000.0, abs=step / 2)


@ALL_BITS
@BOTH
@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
def test_searched_clipping_is_never_worse_than_the_full_range(
    bits: int, symmetric: bool, scale_dtype: ScaleDtype
) -> None:
    weight = normal(32, 256, seed=bits) ** 3  # heavy tails: clipping pays
    scheme = scheme_of(bits, symmetric, scale_dtype=scale_dtype)
    nearest = error_of(weight, quantize_weight_nearest(weight, scheme))
    searched = error_of(weight, quantize_weight_mse(weight, scheme))
    # the search compares float32 sums of 64 squares: 64·2^-24 relative
    assert (searched <= nearest * (1 + 64 * 2.0**-24)).all()
    if bits < 8:
        assert searched.sum() < nearest.sum()


@ALL_BITS
@BOTH
def test_the_search_finds_the_best_of_its_grid(bits: int, symmetric: bool) -> None:
    weight = normal(6, 64, seed=1) ** 3
    scheme = scheme_of(bits, symmetric)
    groups = weight.view(6, 1, 64)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    ratios = [1.0 - 0.4 * step / 40 for step in range(40)]
    errors = [
        error_of(weight, quantize_groups(groups, low * ratio, high * ratio, scheme))
        for ratio in ratios
    ]
    best = torch.stack(errors).amin(0)
    found = error_of(weight, quantize_groups(groups, *best_clipping(groups, scheme), scheme))
    assert torch.allclose(found, best, rtol=64 * 2.0**-24, atol=0)


NESTED = [(32, 64), (64, 128), (128, 256), (32, "channel"), (96, 192), (256, "channel")]


@pytest.mark.parametrize(("fine", "coarse"), NESTED, ids=lambda group: str(group))
@BOTH
def test_finer_nested_groups_have_scales_no_larger(fine: Any, coarse: Any, symmetric: bool) -> None:
    # a subset's range lies within the set's, so s, and the bound s/2 on the error, cannot grow
    weight = normal(16, 768, seed=2)
    fine_scale, coarse_scale = (
        quantize_weight_nearest(weight, scheme_of(4, symmetric, group)).scale
        for group in (fine, coarse)
    )
    spread = coarse_scale.repeat_interleave(fine_scale.shape[1] // coarse_scale.shape[1], dim=1)
    assert (fine_scale <= spread).all()


@BOTH
@pytest.mark.parametrize("bits", [3, 4, 6, 8], ids=lambda bits: f"w{bits}")
def test_finer_nested_groups_lower_the_error_of_a_matrix(bits: int, symmetric: bool) -> None:
    # not so for each single group (a coarser grid may happen to hit a value), but for their sum
    weight = normal(64, 768, seed=4)
    errors = [
        error_of(weight, quantize_weight_nearest(weight, scheme_of(bits, symmetric, group))).sum()
        for group in (32, 64, 128, 256, "channel")
    ]
    assert all(fine < coarse for fine, coarse in itertools.pairwise(errors))


@BOTH
def test_more_bits_lower_the_error(symmetric: bool) -> None:
    weight = normal(64, 256, seed=5)
    errors = [
        error_of(weight, quantize_weight_nearest(weight, scheme_of(bits, symmetric))).sum()
        for bits in sorted(BITS, reverse=True)
    ]
    assert all(fine < coarse for fine, coarse in itertools.pairwise(errors))


@BOTH
def test_scaling_by_a_power_of_two_scales_the_result(symmetric: bool) -> None:
    weight = normal(8, 128)
    scheme = scheme_of(4, symmetric, scale_dtype="float16")
    plain, scaled = (quantize_weight_nearest(factor * weight, scheme) for factor in (1.0, 4.0))
    assert torch.equal(plain.values, scaled.values)
    assert torch.equal(4.0 * plain.scale, scaled.scale)


def test_symmetric_quantization_is_odd() -> None:
    x = normal(4, 128)
    scheme = LayerScheme(4, 4, 64, 64)
    assert torch.equal(fake_quantize_activation(-x, scheme), -fake_quantize_activation(x, scheme))


@BOTH
def test_tokens_do_not_see_one_another(symmetric: bool) -> None:
    x = normal(3, 7, 128)
    scheme = LayerScheme(4, 8, 64, 64, activation_symmetric=symmetric)
    whole = fake_quantize_activation(x, scheme)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fake_quantize_activation(x[:, order], scheme), whole[:, order])
    assert torch.equal(fake_quantize_activation(x[1, 2], scheme), whole[1, 2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_activations_are_quantized_in_float32(dtype: torch.dtype) -> None:
    x = normal(4, 128).to(dtype)
    scheme = LayerScheme(4, 8, 64, 64)
    found = fake_quantize_activation(x, scheme)
    assert found.dtype == dtype
    assert torch.equal(found, fake_quantize_activation(x.float(), scheme).to(dtype))


def test_float64_activations_are_quantized_in_float64() -> None:
    x = normal(4, 128).double()
    scale = quantize_activation(x, LayerScheme(4, 8, 64, 64))[1]
    assert scale.dtype == torch.float64
    assert torch.equal(scale, x.view(4, 2, 64).abs().amax(-1, keepdim=True) / 127)


def test_sixteen_bit_activations_pass_untouched() -> None:
    x = normal(4, 128)
    assert fake_quantize_activation(x, LayerScheme(4, 16)) is x


@BOTH
def test_float16_scales_are_chosen_before_the_integers(symmetric: bool) -> None:
    weight = normal(8, 128) * 0.01
    found = quantize_weight_nearest(weight, scheme_of(4, symmetric))
    assert torch.equal(found.scale.half().float(), found.scale)
    # the integers are the nearest to the weight for the stored scale, not for the exact one
    error = (found.dequantize() - weight).view(8, 2, 64).abs().amax(-1)
    # at the ends of the range rounding s down clips up to (2^b − 1)·2^-11 of a step more
    assert (error <= found.scale * (0.5 + 15 * 2.0**-11)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@KINDS
def test_dequantization_in_any_dtype_is_the_exact_product_rounded(
    dtype: torch.dtype, scheme: LayerScheme
) -> None:
    found = quantize_weight_nearest(normal(8, 128), scheme)
    # s·m has 15 significant bits: in float16 it would be rounded before the product
    exact = found.dequantize(torch.float64)
    assert torch.equal(found.dequantize(dtype), exact.to(dtype))


@KINDS
def test_moving_a_weight_keeps_it(scheme: LayerScheme) -> None:
    found = quantize_weight_nearest(normal(8, 128), scheme)
    moved = found.to("cpu")
    assert moved.tensors().keys() == found.tensors().keys()
    for name, tensor in found.tensors().items():
        assert torch.equal(moved.tensors()[name], tensor)
    assert moved.bits == found.bits
    assert all(tensor.is_meta for tensor in found.to("meta").tensors().values())


@KINDS
def test_a_weight_is_made_of_its_tensors(scheme: LayerScheme) -> None:
    found = quantize_weight_nearest(normal(8, 128), scheme)
    assert ("zero_point" in found.tensors()) == (not scheme.weight_symmetric)
    assert ("multiplier" in found.tensors()) == scheme.has_integer_scales
    again = QuantizedWeight.of(found.tensors(), found.bits)
    for part in ("values", "scale", "zero_point", "bits", "multiplier"):
        assert getattr(again, part) is getattr(found, part)


def test_float_scales_have_no_parts() -> None:
    found = quantize_weight_nearest(normal(8, 128), scheme_of(4, True))
    with pytest.raises(ValueError, match="no scale a channel"):
        _ = found.channel_scale
    with pytest.raises(ValueError, match="do not make integers"):
        found.int8_values()
