"""Costs against the real checkpoint, the plan's own figures, and arithmetic worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qdit.calibrate.block_store import LayerError
from qdit.calibrate.plan import LinearSpec, uniform_plan
from qdit.calibrate.schemes import LayerScheme
from qdit.calibrate.search.bitops import linear_bitops
from qdit.calibrate.search.budget import Budget, BudgetRequest, parse_budget
from qdit.calibrate.search.checkpoint_bytes import fixed_checkpoint_bytes
from qdit.calibrate.search.costs import (
    bitops_cost,
    bytes_cost,
    choice_costs,
    effective_bits_cost,
    tokens_per_image,
)
from qdit.calibrate.search.space import search_space
from qdit.errors import InputError

SCHEMES = {
    "w4 g32": LayerScheme(weight_group=32, activation_group="token"),
    "w3 channel asym": LayerScheme(3, 8, "channel", "token", False),
    "w6 g64 float32": LayerScheme(6, 8, 64, 32, scale_dtype="float32"),
    "w4 g32 int": LayerScheme(weight_group=32, activation_group=32, scale_format="integer"),
    "w16": LayerScheme(weight_bits=16, activation_bits=16),
}
schemes = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())


@schemes
def test_effective_bits_are_the_plans_own(linears: list[LinearSpec], scheme: LayerScheme) -> None:
    plan = uniform_plan("custom", scheme, linears)
    total = effective_bits_cost(linears).total(plan)
    assert total == pytest.approx(plan.effective_weight_bits(linears), rel=1e-14)


@schemes
def test_bytes_are_a_written_checkpoints(
    scheme: LayerScheme, make_quantized: Callable, tmp_path: Path
) -> None:
    made = make_quantized(scheme, num_layers=3, num_attention_heads=4)
    made.checkpoint.write(tmp_path)
    written = sum(file.stat().st_size for file in tmp_path.iterdir())
    tensors = (tmp_path / "weights.safetensors").stat().st_size
    linears = made.model.linears
    fixed = fixed_checkpoint_bytes(made.model, made.plan)
    total = bytes_cost(linears, fixed).total(made.plan)
    # everything but the manifest's provenance and metrics, which this checkpoint nearly lacks
    metrics = sum(len(spec.name) + (200 if scheme.has_integer_scales else 90) for spec in linears)
    assert 0 <= total - written <= 700 + metrics
    assert total > tensors


def test_the_bytes_of_metrics_are_allowed_for(make_quantized: Callable) -> None:
    """A linear's errors, with integer scales those of float ones too, as an export writes them."""
    made = make_quantized(SCHEMES["w4 g32 int"], num_layers=3)
    error = LayerError(1 / 3, 2 / 3, LayerError(1 / 7, 2 / 7)).to_json()
    metrics = {spec.name: error for spec in made.model.linears}
    checkpoint = type(made.checkpoint).from_result(
        made.model, made.plan, made.weights, {"weights": "gptq", "seed": 0}, metrics
    )
    fixed = fixed_checkpoint_bytes(made.model, made.plan)
    total = bytes_cost(made.model.linears, fixed).total(made.plan)
    # what docs/search.md promises
    assert total == pytest.approx(checkpoint.byte_size, abs=1024)


def test_bytes_differ_between_plans_as_files_do(make_quantized: Callable) -> None:
    made = [make_quantized(SCHEMES["w4 g32"]), make_quantized(LayerScheme(4, 8, 64, 64))]
    costs = bytes_cost(made[0].model.linears, 0)
    difference = costs.total(made[0].plan) - costs.total(made[1].plan)
    real = made[0].checkpoint.byte_size - made[1].checkpoint.byte_size
    # digits of shapes and of group names in header and manifest: a few bytes a linear
    assert difference == pytest.approx(real, abs=16 * len(made[0].model.linears))


def spec_of(k: int, n: int, role: str = "mlp_in") -> LinearSpec:
    return LinearSpec("layer", role, 0, k, n, True, "layer.input")  # type: ignore[arg-type]


BITOPS = {
    # 2·3·64 products of 16·16
    "w16a16": (LayerScheme(weight_bits=16, activation_bits=16), 2 * 3 * 64 * 256),
    # 2·3 outputs with 64/32 groups, each a multiply-add of 32·16
    "weight-only": (
        LayerScheme(4, 16, 32),
        2 * 3 * 64 * 4 * 16 + 2 * 3 * 2 * 32 * 16,
    ),
    # 2 segments times the weight's scale, 1 sum times the token's; 64 values and 1 scale quantized
    "token": (
        LayerScheme(4, 8, 32, "token"),
        2 * 3 * 64 * 4 * 8 + 2 * 3 * (2 * 32 * 16 + 32 * 32) + 2 * (64 + 1) * 1024,
    ),
    # 2 segments times a multiplier of 5 bits, 1 sum times the channel's scale and the token's
    "integer scales": (
        LayerScheme(4, 8, 32, "token", scale_format="integer"),
        2 * 3 * 64 * 4 * 8 + 2 * 3 * (2 * 32 * 5 + 32 * 16 + 32 * 32) + 2 * (64 + 1) * 1024,
    ),
    # the activation side is the finer one, and both have zero points in each of 2 segments
    "asymmetric": (
        LayerScheme(4, 8, "channel", 32, False, False),
        2 * 3 * 64 * 4 * 8
        + 2 * 3 * (2 * 32 * 32 + 32 * 16 + 2 * 32 * (4 + 8))
        + 2 * (64 + 2) * 1024,
    ),
}


@pytest.mark.parametrize(("scheme", "expected"), BITOPS.values(), ids=BITOPS.keys())
def test_bitops_worked_out(scheme: LayerScheme, expected: int) -> None:
    assert linear_bitops(spec_of(64, 3), scheme, rows=2) == expected


def test_bitops_of_groups_that_do_not_nest() -> None:
    # K = 192 cut at 64, 128 and at 96: segments end at 64, 96, 128 and 192, so there are four
    scheme = LayerScheme(4, 8, 96, 64)
    rescaling = 4 * 32 * 32 + 2 * 32 * 16
    expected = 192 * 4 * 8 + rescaling + (192 + 3) * 1024
    assert linear_bitops(spec_of(192, 1), scheme, rows=1) == expected


@pytest.mark.parametrize("scale_format", ["float", "integer"])
def test_finer_groups_never_cost_less(linears: list[LinearSpec], scale_format: str) -> None:
    scheme = LayerScheme(scale_format=scale_format)  # type: ignore[arg-type]
    space = search_space(linears, scheme, "w4a8", tied=True)
    for costs in (effective_bits_cost(linears), bytes_cost(linears, 0), bitops_cost(linears, 64)):
        for row in choice_costs(costs, space).values():
            assert list(row) == sorted(row, reverse=True)


def test_adaln_runs_once_an_image(linears: list[LinearSpec]) -> None:
    few, many = bitops_cost(linears, 64), bitops_cost(linears, 256)
    scheme = LayerScheme(4, 16)
    adaln, other = linears[0], linears[1]
    assert few.share(adaln, scheme) == many.share(adaln, scheme)
    assert 4 * few.share(other, scheme) == many.share(other, scheme)


def test_tokens_come_from_the_model(make_model: Callable) -> None:
    assert tokens_per_image(make_model()) == (8 // 2) ** 2


class TestBudget:
    @pytest.mark.parametrize(
        ("text", "request_"),
        [
            ("effective-bits=4.25", BudgetRequest("effective-bits", 4.25, None)),
            (" bytes = 3.5e8 ", BudgetRequest("bytes", 3.5e8, None)),
            ("bitops=g128", BudgetRequest("bitops", None, 128)),
            ("latency-ms=channel", BudgetRequest("latency-ms", None, "channel")),
        ],
        ids=lambda value: str(value),
    )
    def test_parses(self, text: str, request_: BudgetRequest) -> None:
        assert parse_budget(text) == request_

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("4.25", "KIND=VALUE with KIND one of effective-bits, bytes, bitops, latency-ms"),
            ("effective-bits", "KIND=VALUE"),
            ("size=3", "KIND=VALUE"),
            ("bytes=", "positive number or a uniform plan such as g128"),
            ("bytes=-1", "positive number"),
            ("bytes=0", "positive number"),
            ("bytes=nan", "positive number"),
            ("bytes=inf", "positive number"),
            ("bytes=128MB", "positive number"),
            ("bytes=g100", "must be one of g32, .* or channel, got 'g100'"),
            ("bytes=token", "positive number"),
        ],
    )
    def test_refuses(self, text: str, match: str) -> None:
        with pytest.raises(InputError, match=match) as caught:
            parse_budget(text)
        assert "\n" not in str(caught.value)

    def test_a_uniform_plan_means_its_own_cost(self, linears: list[LinearSpec]) -> None:
        costs = effective_bits_cost(linears)
        budget = parse_budget("effective-bits=g64").resolve(costs, linears, LayerScheme())
        assert budget == Budget("effective-bits", pytest.approx(4.25))
        channel = parse_budget("effective-bits=channel").resolve(costs, linears, LayerScheme())
        assert 4 < channel.value < budget.value

    def test_a_group_that_does_not_fit_is_refused(self, linears: list[LinearSpec]) -> None:
        costs = effective_bits_cost(linears)
        with pytest.raises(InputError, match="must divide the 192 input channels"):
            parse_budget("effective-bits=g128").resolve(costs, linears, LayerScheme())

    def test_allows_its_own_value_however_it_was_summed(self) -> None:
        assert Budget("effective-bits", 0.3).allows(0.1 + 0.1 + 0.1)
        assert not Budget("effective-bits", 0.3).allows(0.3 + 1e-8)
