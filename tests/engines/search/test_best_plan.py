"""Which of the judged plans a search takes."""

from __future__ import annotations

import math

import pytest

from qdit.calibrate.plan import LinearSpec, QuantizationPlan, uniform_plan
from qdit.calibrate.schemes import LayerScheme
from qdit.calibrate.search.fitness import Fitness
from qdit.engines.search.by_sensitivity import best_plan, fid_of_the_dearest

LINEARS = (LinearSpec("a", "mlp_in", 0, 256, 64, True, "x"),)


def plan(group: int) -> QuantizationPlan:
    scheme = LayerScheme(4, 8, weight_group=group, activation_group=group)
    return uniform_plan("w4a8", scheme, LINEARS)


def judged(*rows: tuple[QuantizationPlan, float | None, float | None]) -> dict[str, Fitness]:
    return {own.digest: Fitness(fid, psnr, 1.0) for own, fid, psnr in rows}


FIRST, SECOND, THIRD = plan(32), plan(64), plan(128)
PLANS = [FIRST, SECOND, THIRD]


def test_the_first_where_nothing_was_judged() -> None:
    assert best_plan(PLANS, {}, "psnr") is FIRST


@pytest.mark.parametrize(
    ("by", "bound", "chosen"),
    [
        ("psnr", None, FIRST),
        ("psnr", 0.6, SECOND),  # the first has the better PSNR and too high a FID
        ("psnr", 0.55, THIRD),
        ("psnr", 0.1, FIRST),  # none is within: the best PSNR
        ("fid", 0.6, THIRD),
    ],
)
def test_the_best_psnr_within_the_bound_or_the_least_fid(
    by: str, bound: float | None, chosen: QuantizationPlan
) -> None:
    fitness = judged((FIRST, 0.63, 29.5), (SECOND, 0.58, 29.0), (THIRD, 0.5, 28.0))
    assert best_plan(PLANS, fitness, by, bound) is chosen


def test_images_that_are_not_finite_come_last() -> None:
    fitness = judged((FIRST, math.inf, None), (SECOND, 0.6, 20.0), (THIRD, 0.6, 21.0))
    assert best_plan(PLANS, fitness, "psnr") is THIRD
    assert best_plan(PLANS, fitness, "psnr", 0.1) is THIRD


def test_without_fid_files_psnr_decides() -> None:
    fitness = judged((FIRST, None, 20.0), (SECOND, None, 22.0), (THIRD, None, 21.0))
    assert best_plan(PLANS, fitness, "psnr", None) is SECOND


def test_the_bound_is_the_dearest_judged_plan_s() -> None:
    cost = {FIRST.digest: 4.5, SECOND.digest: 4.25, THIRD.digest: 4.125}
    fitness = judged((SECOND, 0.7, 1.0), (THIRD, 0.8, 1.0))
    assert fid_of_the_dearest(PLANS, fitness, lambda own: cost[own.digest]) == 0.7
    assert fid_of_the_dearest(PLANS, {}, lambda own: cost[own.digest]) is None
