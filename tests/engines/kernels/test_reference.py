"""The kernels' meaning in torch, against the simulation: the GPU tests compare kernels with it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from qdit.calibrate.quantizers import quantize_activation, quantize_weight_nearest
from qdit.calibrate.schemes import LayerScheme
from qdit.engines.kernels.layouts import from_panels, scale_order
from qdit.engines.kernels.operands import Gate, Modulation
from qdit.engines.kernels.product import linear
from qdit.engines.kernels.reference import dequantized_rows, dequantized_weight
from qdit.engines.kernels.rows import quantize_rows
from qdit.engines.kernels.variants import LinearKind, QuantizeKind, WeightOnlyKind
from qdit.engines.kernels.weight_only import weight_only_linear
from qdit.engines.kernels.weights import pack_weight
from qdit.errors import InputError

from .conftest import SCHEMES, make_problem, output_bound

by_name = pytest.mark.parametrize("name", SCHEMES)


@by_name
def test_quantized_rows_are_the_simulation_s_to_the_bit(name: str) -> None:
    problem = make_problem(SCHEMES[name], 37, 1152, 64)
    rows = quantize_rows(problem.x, problem.rows_kind)
    values, scale, zero = quantize_activation(problem.x, problem.scheme)
    half = 0 if problem.scheme.activation_symmetric else 128
    stored = values.reshape(37, 1152) - half
    order = scale_order(rows.rows)[:37]
    assert torch.equal(from_panels(rows.values, 37, 1152).float(), stored)
    assert torch.equal(rows.scale[: scale.shape[1], order].t(), scale.squeeze(-1))
    if rows.zero is not None:
        assert torch.equal(rows.zero[: zero.shape[1], order].t() + half, zero.squeeze(-1))
    if rows.total is not None:
        size = problem.rows_kind.sum_group
        assert torch.equal(rows.total[:, order].t(), stored.unflatten(1, (-1, size)).sum(2))


@by_name
def test_a_packed_weight_is_the_quantized_one(name: str) -> None:
    problem = make_problem(SCHEMES[name], 1, 1152, 72)
    assert torch.equal(dequantized_weight(problem.packed), problem.weight.dequantize(torch.float64))


@by_name
def test_a_product_is_the_simulation_s_within_its_output_s_rounding(name: str) -> None:
    problem = make_problem(SCHEMES[name], 37, 1152, 72)
    rows = quantize_rows(problem.x, problem.rows_kind)
    y = linear(rows, problem.packed, problem.kind, bias=problem.bias)
    expected, magnitude = problem.expected()
    assert ((y.double() - expected).abs() <= output_bound(expected, magnitude, y.dtype, 1152)).all()


def test_widths_that_are_no_whole_panels_are_padded_with_nothing() -> None:
    problem = make_problem(LayerScheme(4, 8, 64, 64, False, False), 5, 192, 24)
    rows = quantize_rows(problem.x, problem.rows_kind)
    assert rows.values.shape == (2, 16, 128)
    y = linear(rows, problem.packed, problem.kind, bias=problem.bias)
    expected, magnitude = problem.expected()
    assert ((y.double() - expected).abs() <= output_bound(expected, magnitude, y.dtype, 192)).all()


def test_stacked_linears_give_each_its_own_output() -> None:
    scheme = SCHEMES["w4 g128"]
    problems = [make_problem(scheme, 9, 256, 64, seed=seed) for seed in range(3)]
    rows = quantize_rows(problems[0].x, problems[0].rows_kind)
    stacked = pack_weight([problem.weight for problem in problems], scheme, problems[0].kind)
    together = linear(rows, stacked, problems[0].kind)
    for problem, own in zip(problems, together.split(64, dim=1), strict=True):
        assert torch.equal(own, linear(rows, problem.packed, problem.kind))


def test_normalized_and_modulated_rows() -> None:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(24, 256, generator=random).half() * 3 + 1
    both = torch.randn(3, 6 * 256, generator=random).half() * 0.3
    shift, scale = both[:, :256], both[:, 256:512]
    kind = QuantizeKind(256, 128, normalized=True)
    rows = quantize_rows(x, kind, Modulation(shift, scale, 8, 1e-6))
    wide = x.double()
    normal = (wide - wide.mean(1, keepdim=True)) / (
        wide.var(1, unbiased=False, keepdim=True) + 1e-6
    ).sqrt()
    expected = normal * (1 + scale.double().repeat_interleave(8, 0))
    expected += shift.double().repeat_interleave(8, 0)
    step = expected.unflatten(1, (-1, 128)).abs().amax(2, keepdim=True) / 127
    error = (dequantized_rows(rows) - expected).unflatten(1, (-1, 128)).abs()
    assert (error <= 0.5001 * step).all()


@pytest.mark.parametrize("form", ["tanh", "exact"])
def test_rows_through_gelu(form: str) -> None:
    x = torch.randn(7, 128, generator=torch.Generator().manual_seed(2)).half() * 2
    rows = quantize_rows(x, QuantizeKind(128, 64, gelu=form))  # type: ignore[arg-type]
    approximate = "tanh" if form == "tanh" else "none"
    expected = functional.gelu(x.double(), approximate=approximate)
    step = expected.unflatten(1, (-1, 64)).abs().amax(2, keepdim=True) / 127
    error = (dequantized_rows(rows) - expected).unflatten(1, (-1, 64)).abs()
    assert (error <= 0.5001 * step).all()


def test_a_gate_adds_the_product_to_the_residual_image_by_image() -> None:
    problem = make_problem(SCHEMES["w4 g64"], 24, 128, 64)
    rows = quantize_rows(problem.x, problem.rows_kind)
    random = torch.Generator().manual_seed(3)
    residual = torch.randn(24, 64, generator=random).half()
    factors = torch.randn(3, 3 * 64, generator=random).half()[:, 64:128]
    plain = linear(rows, problem.packed, problem.kind, bias=problem.bias)
    y = linear(
        rows, problem.packed, problem.kind, bias=problem.bias, gate=Gate(residual, factors, 8)
    )
    expected = residual.double() + factors.double().repeat_interleave(8, 0) * plain.double()
    assert torch.equal(y, expected.half())


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_weight_only_product(bits: int, symmetric: bool) -> None:
    scheme = LayerScheme(bits, 16, 64, weight_symmetric=symmetric)
    random = torch.Generator().manual_seed(4)
    x = torch.randn(5, 192, generator=random).half()
    weight = quantize_weight_nearest(torch.randn(72, 192, generator=random), scheme)
    bias = torch.randn(72, generator=random).half()
    packed = pack_weight([weight], scheme)
    y = weight_only_linear(x, packed, WeightOnlyKind.of(scheme, 192), bias)
    expected = x.double() @ weight.dequantize(torch.float64).t() + bias.double()
    assert torch.equal(y, expected.half())


def test_a_weight_only_product_takes_integer_scales_as_the_groups_own() -> None:
    scheme = LayerScheme(4, 16, 64, scale_format="integer")
    weight = quantize_weight_nearest(torch.randn(64, 128), scheme)
    packed = pack_weight([weight], scheme)
    assert packed.multiplier is None
    assert torch.equal(dequantized_weight(packed), weight.dequantize(torch.float64))


def test_integer_scales_are_one_scale_a_channel_and_a_byte_a_group() -> None:
    problem = make_problem(SCHEMES["w4 g128 integer token"], 1, 1152, 64)
    packed = problem.packed
    assert packed.scale.shape == (1, 64)
    assert packed.multiplier is not None
    assert packed.multiplier.dtype == torch.uint8
    assert torch.equal(packed.multiplier.t(), problem.weight.multiplier)


def refused(match: str, call: object) -> None:
    with pytest.raises(InputError, match=match):
        call()  # type: ignore[operator]


def test_operands_that_do_not_fit_are_refused() -> None:
    problem = make_problem(SCHEMES["w4 g64"], 8, 128, 64)
    rows, kind = quantize_rows(problem.x, problem.rows_kind), problem.kind
    packed, bias = problem.packed, problem.bias
    wide = make_problem(SCHEMES["w4 g64"], 8, 256, 64)
    token = quantize_rows(problem.x, QuantizeKind(128, 128))
    odd = make_problem(SCHEMES["w4 g64"], 8, 128, 60)
    residual = torch.zeros(8, 64).half()
    refused(r"rows \[M, 128\] with M ≥ 1, got .*\[8, 256\]",
            lambda: quantize_rows(wide.x, problem.rows_kind))  # fmt: skip
    refused(r"rows \[M, 128\] with M ≥ 1, got torch.float64",
            lambda: quantize_rows(problem.x.double(), problem.rows_kind))  # fmt: skip
    refused("a multiple of 4 values apart", lambda: quantize_rows(
        torch.zeros(8, 130).half()[:, :128], problem.rows_kind))  # fmt: skip
    refused("the same width, got 128 and 256", lambda: linear(rows, wide.packed, wide.kind))
    refused("rows of group 64, got 128", lambda: linear(token, packed, kind))
    refused("float16 or bfloat16, got torch.float32",
            lambda: linear(rows, packed, kind, dtype=torch.float32))  # fmt: skip
    refused("a multiple of 8, got 60", lambda: linear(rows, odd.packed, odd.kind))
    refused(r"the bias must be torch.float16 \[64\]",
            lambda: linear(rows, packed, kind, bias=bias[:32]))  # fmt: skip
    refused(r"the residual must be torch.float16 \[8, 64\]", lambda: linear(
        rows, packed, kind, gate=Gate(residual[:4], residual[:1], 8)))  # fmt: skip
    refused(r"the gate must be torch.float16 \[2, 64\]", lambda: linear(
        rows, packed, kind, gate=Gate(residual, residual[:1], 4)))  # fmt: skip
    refused("needs its modulation", lambda: quantize_rows(
        problem.x, QuantizeKind(128, 64, normalized=True)))  # fmt: skip
    refused(r"shift must be 16-bit \[1, 128\]", lambda: quantize_rows(
        problem.x, QuantizeKind(128, 64, normalized=True),
        Modulation(residual, residual, 8, 1e-6)))  # fmt: skip
    refused("takes float16 or bfloat16 rows", lambda: weight_only_linear(
        problem.x.float(), packed, WeightOnlyKind(128, 4, 64)))  # fmt: skip


@pytest.mark.parametrize(
    ("scheme", "match"),
    [
        (LayerScheme(4, 16), "both sides quantized"),
        (LayerScheme(4, 8, 144, 144), "a multiple of 32, got 144"),
        (LayerScheme(4, 8, 256, 256), "divide the layer's 1152"),
    ],
)
def test_a_scheme_that_no_product_computes_is_refused(scheme: LayerScheme, match: str) -> None:
    refused(match, lambda: LinearKind.of(scheme, 1152))
