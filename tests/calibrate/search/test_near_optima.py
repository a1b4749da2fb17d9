"""Plans near the optimum: distinct, within the budget, the solver's own first."""

from __future__ import annotations

from qdit.calibrate.search.near_optima import near_optima
from qdit.calibrate.search.solver import solve

ERRORS = {f"layer {i}": [1.0 / (j + 1 + 0.1 * i) for j in range(4)] for i in range(5)}
COSTS = {f"layer {i}": [1.0 + j for j in range(4)] for i in range(5)}


def test_near_optima_start_with_the_optimum_and_keep_the_budget() -> None:
    plans = near_optima(ERRORS, COSTS, 11.0, 6)
    assert plans[0] == solve(ERRORS, COSTS, 11.0)
    assert len({tuple(plan.values()) for plan in plans}) == len(plans) > 1
    for plan in plans:
        assert sum(COSTS[name][gene] for name, gene in plan.items()) <= 11.0
    assert near_optima(ERRORS, COSTS, 11.0, 6) == plans
    others = near_optima(ERRORS, COSTS, 11.0, 6, seed=1)
    assert others[0] == plans[0]
    assert others != plans


def test_fewer_near_optima_come_back_where_there_is_one_plan() -> None:
    assert len(near_optima(ERRORS, COSTS, 5.0, 4)) == 1


def test_no_more_near_optima_come_back_than_there_are_plans() -> None:
    """Two layers of two choices within 3 of their 2 … 4: all but both fine ones fit."""
    errors = {"a": [1.0, 0.9], "b": [1.0, 0.9]}
    costs = {"a": [1.0, 2.0], "b": [1.0, 2.0]}
    plans = near_optima(errors, costs, 3.0, 10)
    found = {tuple(plan.values()) for plan in plans}
    assert len(found) == len(plans)
    assert {(1, 0), (0, 1)} <= found <= {(0, 0), (1, 0), (0, 1)}


def test_the_optimum_keeps_the_tie_break() -> None:
    errors, costs = {"a": [1.0, 1.0]}, {"a": [1.0, 1.0]}
    for tie_break, chosen in (([2.0, 1.0], 1), ([1.0, 2.0], 0)):
        plans = near_optima(errors, costs, 1.0, 1, tie_break={"a": tie_break})
        assert plans == [{"a": chosen}]
