"""Comparisons, image parity and the gate: figures worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qdit.calibrate.fid import FidDifference
from qdit.engines.gate import LINEAR_BOUND, Gate, Limits, judge
from qdit.engines.parity import DenoiserParity
from qdit.engines.parity_images import ImageParity, image_parity
from qdit.engines.parity_inputs import spread
from qdit.engines.parity_internals import LinearError
from qdit.engines.parity_measure import Comparer, Comparison, compare
from qdit.engines.parity_timesteps import DenoiserBound, denoiser_bound
from qdit.errors import InputError

# --- a comparison -------------------------------------------------------------------------------


def test_a_comparison_holds_the_relative_error_and_the_worst_coordinate() -> None:
    expected = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    got = torch.tensor([[3.0, 0.3], [0.0, 3.6]])
    made = compare(got, expected)
    # ‖(0.3, 0.4)‖ / ‖(3, 4)‖ = 0.5 / 5
    assert made.relative_error == pytest.approx(0.1, rel=1e-6)
    assert made.worst is not None
    assert made.worst.where == (0, 1, 1)
    assert (made.worst.expected, made.worst.got) == (4.0, pytest.approx(3.6))
    assert made.worst.needed_tolerance == pytest.approx(0.4, rel=1e-6)
    assert torch.allclose(got, expected, rtol=0, atol=made.worst.needed_tolerance)


def test_adding_tensors_equals_comparing_them_joined() -> None:
    generator = torch.Generator().manual_seed(0)
    expected = torch.randn(6, 5, generator=generator)
    got = expected + 0.1 * torch.randn(6, 5, generator=generator)
    comparer = Comparer()
    for one, other in zip(got.split(2), expected.split(2), strict=True):
        comparer.add(one, other)
    joined = compare(got, expected)
    made = comparer.result()
    assert made.relative_error == pytest.approx(joined.relative_error, rel=1e-12)
    assert made.elements == 30
    assert made.worst is not None and joined.worst is not None
    part, row, column = made.worst.where
    assert (0, 2 * part + row, column) == joined.worst.where


def test_scale_is_seen_where_cosine_similarity_is_blind() -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(1))
    assert compare(2 * x, x).relative_error == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("got", "expected", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([1e-9, 0.0], [0.0, 0.0], math.inf),
        ([math.nan, 1.0], [1.0, 1.0], math.inf),
        ([math.inf, 1.0], [math.inf, 1.0], math.inf),
    ],
    ids=["equal", "both-zero", "zero-norm", "nan", "both-infinite"],
)
def test_edges_of_the_relative_error(got: list[float], expected: list[float], error: float) -> None:
    made = compare(torch.tensor(got), torch.tensor(expected))
    if math.isinf(error):
        assert not math.isfinite(made.relative_error)
    else:
        assert made.relative_error == error


def test_float16_and_float32_are_compared_in_float64() -> None:
    x = torch.tensor([60000.0, 60000.0])
    assert compare(x.half(), x).relative_error == 0.0  # 60000² overflows float16 itself


def test_different_shapes_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match=r"shapes \[2\] and \[3\]"):
        compare(torch.zeros(2), torch.zeros(3))


@pytest.mark.parametrize(
    ("length", "count", "expected"),
    [(20, 5, [0, 5, 10, 14, 19]), (3, 5, [0, 1, 2]), (1, 5, [0])],
)
def test_spread_keeps_both_ends(length: int, count: int, expected: list[int]) -> None:
    assert spread(length, count) == expected


# --- images -------------------------------------------------------------------------------------


def test_psnr_is_that_of_the_mean_squared_error() -> None:
    made = image_parity([0.04, 0.0004, 0.0004])
    # peak 2: 10 log10(4 / 0.0136) = 24.685…, worst 10 log10(4 / 0.04) = 20, median 40
    assert made.psnr_db == pytest.approx(10 * math.log10(4 / 0.0136))
    assert (made.psnr_db_min, made.worst_image) == (pytest.approx(20.0), 0)
    assert made.psnr_db_median == pytest.approx(40.0)
    assert (made.samples, made.identical, made.not_finite) == (3, False, 0)


def test_identical_images_have_no_psnr_and_say_so() -> None:
    made = image_parity(np.zeros(4))
    assert (made.psnr_db, made.psnr_db_min, made.psnr_db_median) == (None, None, None)
    assert made.identical and made.worst_image is None


def test_one_changed_image_among_identical_ones_is_the_worst() -> None:
    made = image_parity([0.0, 0.0, 0.04])
    assert (made.psnr_db_min, made.psnr_db_median) == (pytest.approx(20.0), None)
    assert made.worst_image == 2 and not made.identical


def test_images_that_are_not_finite_are_counted() -> None:
    made = image_parity([0.1, np.nan, np.inf])
    assert (made.psnr_db, made.not_finite, made.worst_image) == (None, 2, 1)
    assert not made.identical


@pytest.mark.parametrize("errors", [[], [[0.1]]], ids=["none", "matrix"])
def test_malformed_squared_errors_are_refused(errors: list[object]) -> None:
    with pytest.raises(InputError, match="needs squared errors"):
        image_parity(np.asarray(errors, dtype=float))


# --- the bound and the gate ---------------------------------------------------------------------


def apart(relative: float) -> Comparison:
    return Comparison(relative * 10, 10.0, 100, None)


def a_linear(error: float, own: float | None = None, name: str = "blocks.0.q") -> LinearError:
    return LinearError(name, "attention_qkv", 0, apart(error), own)


def a_parity(
    *,
    linears: list[LinearError] | None = None,
    engine: float = 1e-5,
    own: float = 1e-5,
    simulation: float = 0.02,
) -> DenoiserParity:
    return DenoiserParity(
        simulation=apart(simulation),
        engine=apart(engine),
        bound=DenoiserBound(apart(engine), apart(own), ("float32", "float64"), 8),
        linears=[a_linear(3e-7)] if linears is None else linears,
        blocks=[],
        timesteps=[],
        images=2,
        dtype="float32",
    )


def a_fid(low: float, full: float = 5.0) -> FidDifference:
    return FidDifference(
        full, full + low + 0.1, low + 0.1, (low, low + 0.2), 64, 8, 100, 100, 0.0, ""
    )


IMAGES = image_parity([0.001, 0.002])


def outcome(gate: Gate, name: str) -> str:
    return next(check.outcome for check in gate.checks if check.name == name)


def test_good_figures_pass_every_check() -> None:
    gate = judge(a_parity(), IMAGES, a_fid(0.1), Limits())
    assert gate.passed and gate.complete
    assert gate.reason == "every check held"
    names = [check.name for check in gate.checks]
    assert names == [
        "finite_images",
        "linears_same_input",
        "denoiser_bound",
        "simulation_error",
        "fid_increase",
    ]


@pytest.mark.parametrize(
    ("low", "limits", "passes"),
    [
        (0.99, Limits(), True),  # 20 % of 5.0 is 1.0
        (1.01, Limits(), False),
        (0.3, Limits(0.2), False),
        (0.2, Limits(0.2), True),
        (-0.1, Limits(0.0), True),
        (0.01, Limits(0.0), False),
    ],
)
def test_the_lower_end_of_the_fid_interval_decides(
    low: float, limits: Limits, passes: bool
) -> None:
    gate = judge(a_parity(), IMAGES, a_fid(low), limits)
    assert gate.passed is passes
    assert outcome(gate, "fid_increase") == ("passed" if passes else "failed")


def test_a_missing_fid_is_not_run_with_its_reason_and_never_passed() -> None:
    gate = judge(a_parity(), IMAGES, None, Limits(), no_fid="no reference statistics were given")
    assert outcome(gate, "fid_increase") == "not run"
    assert gate.passed and not gate.complete
    assert gate.reason == "FID was not measured: no reference statistics were given"
    check = gate.checks[-1]
    assert (check.value, check.limit) == (None, None)


@pytest.mark.parametrize(
    ("parity", "name", "why"),
    [
        (
            a_parity(linears=[a_linear(1e-7), a_linear(2e-6, name="blocks.7.fc2")]),
            "linears_same_input",
            "blocks.7.fc2 is 2e-06 from its simulation",
        ),
        (a_parity(engine=2.1e-5), "denoiser_bound", "2.10 times the distance between float32"),
        (a_parity(own=0.0), "denoiser_bound", "above the bound 2"),
        (a_parity(simulation=1.2), "simulation_error", "above the bound 1"),
        (a_parity(simulation=math.nan), "simulation_error", "above the bound 1"),
    ],
    ids=["linear", "denoiser", "own-zero", "simulation", "nan"],
)
def test_a_paired_figure_beyond_its_bound_fails(
    parity: DenoiserParity, name: str, why: str
) -> None:
    gate = judge(parity, IMAGES, a_fid(0.0), Limits())
    assert not gate.passed
    assert outcome(gate, name) == "failed"
    assert why in gate.reason


def test_not_finite_images_fail_and_missing_ones_are_not_run() -> None:
    broken = judge(a_parity(), image_parity([0.1, math.nan]), None, Limits())
    assert outcome(broken, "finite_images") == "failed"
    assert "1 of 2 image pairs hold NaN or infinity, image 1 first" in broken.reason
    missing: ImageParity | None = None
    assert outcome(judge(a_parity(), missing, None, Limits()), "finite_images") == "not run"


def test_float16_linears_are_bound_by_twice_their_own_distance() -> None:
    linears = [a_linear(5e-4, own=3e-4), a_linear(1e-4, own=4e-5, name="blocks.1.q")]
    gate = judge(a_parity(linears=linears), IMAGES, None, Limits())
    # 5e-4 ≤ 6e-4 holds, 1e-4 ≤ 8e-5 does not: the reported linear is the one beyond its own bound
    assert outcome(gate, "linears_same_input") == "failed"
    check = gate.checks[1]
    assert check.limit == pytest.approx(8e-5) and "blocks.1.q" in check.why


def test_a_float32_linear_has_the_constant_bound() -> None:
    gate = judge(a_parity(linears=[a_linear(LINEAR_BOUND)]), IMAGES, None, Limits())
    assert outcome(gate, "linears_same_input") == "passed"


def test_a_plan_that_quantizes_nothing_has_no_linears_to_check() -> None:
    gate = judge(a_parity(linears=[], engine=0.0, own=0.0, simulation=0.0), IMAGES, None, Limits())
    assert outcome(gate, "linears_same_input") == "not run"
    assert outcome(gate, "denoiser_bound") == "passed"  # equal bits are no distance at all


def test_the_bound_is_over_all_inputs_together() -> None:
    simulation = [torch.zeros(1, 4), torch.ones(1, 4)]
    wider = [torch.zeros(1, 4), torch.ones(1, 4) + 1e-3]
    engine = [torch.full((1, 4), 1e-3), torch.ones(1, 4)]
    bound = denoiser_bound(engine, simulation, wider, "float32")
    assert bound.ratio == pytest.approx(1.0, rel=1e-3)
    assert (bound.own_dtypes, bound.inputs) == (("float32", "float64"), 2)
    assert denoiser_bound(engine, simulation, wider, "float16").own_dtypes == (
        "float16",
        "float32",
    )
