"""The exact choice against brute force over every plan."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdit.calibrate.search.budget import RELATIVE_SLACK
from qdit.calibrate.search.solver import pareto_front, solve
from qdit.errors import InputError

Tables = tuple[dict[str, list[float]], dict[str, list[float]]]


def brute_force(errors: dict, costs: dict, budget: float) -> list[tuple[float, float, tuple]]:
    """(error, cost, choice) of every plan within the budget, best first."""
    limit = budget + RELATIVE_SLACK * abs(budget)
    plans = []
    for choice in itertools.product(*(range(len(row)) for row in errors.values())):
        cost = math.fsum(row[gene] for row, gene in zip(costs.values(), choice, strict=True))
        if cost <= limit:
            error = math.fsum(row[gene] for row, gene in zip(errors.values(), choice, strict=True))
            plans.append((error, cost, choice))
    return sorted(plans)


def totals(tables: Tables, choice: dict[str, int]) -> tuple[float, float]:
    error, cost = (math.fsum(t[name][gene] for name, gene in choice.items()) for t in tables)
    return error, cost


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict, dict, dict, float]:
    """Up to 5 layers of up to 5 choices; numbers of many magnitudes, with ties among them."""
    magnitude = draw(st.sampled_from([1e-9, 1e-3, 1.0, 1e12]))
    number = st.one_of(
        st.integers(0, 6).map(float), st.floats(0, 1, allow_subnormal=False), st.just(0.1)
    )
    layers = [f"layer{index}" for index in range(draw(st.integers(1, 5)))]
    tables: tuple[dict, ...] = ({}, {}, {})
    for layer in layers:
        size = draw(st.integers(1, 5))
        for table, factor in zip(tables, (magnitude, draw(st.just(1.0)), 1.0), strict=True):
            row = draw(st.lists(number, min_size=size, max_size=size))
            table[layer] = [factor * value for value in row]
    low = math.fsum(min(row) for row in tables[1].values())
    high = math.fsum(max(row) for row in tables[1].values())
    share = draw(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.25, 0.5, 1.0])))
    return (*tables, low + share * (high - low))


@settings(max_examples=150, deadline=None)
@given(problems())
def test_equals_brute_force_and_is_feasible(problem: tuple[dict, dict, dict, float]) -> None:
    errors, costs, _, budget = problem
    error, cost = totals((errors, costs), solve(errors, costs, budget))
    assert cost <= budget + RELATIVE_SLACK * abs(budget)
    largest = sum(max(row) for row in errors.values())
    assert error == pytest.approx(brute_force(errors, costs, budget)[0][0], abs=1e-9 * largest)


@settings(max_examples=80, deadline=None)
@given(problems())
def test_breaks_ties_by_the_second_cost(problem: tuple[dict, dict, dict, float]) -> None:
    errors, costs, ties, budget = problem
    choice = solve(errors, costs, budget, tie_break=ties)
    error, cost = totals((errors, costs), choice)
    assert cost <= budget + RELATIVE_SLACK * abs(budget)
    room = 1e-9 * sum(max(row) for row in errors.values())
    plans = brute_force(errors, costs, budget)
    assert error == pytest.approx(plans[0][0], abs=room)
    # nothing that is exactly as good has a smaller tie-breaking cost
    equal = [plan for plan in plans if plan[0] <= min(error, plans[0][0])]
    least = min(sum(r[g] for r, g in zip(ties.values(), p[2], strict=True)) for p in equal)
    assert totals((ties, ties), choice)[0] <= least + 1e-6 * max(max(r) for r in ties.values())


@pytest.mark.parametrize("smallest", [5e-324, 3.5e-312, 1e-300], ids=str)
def test_differences_without_a_finite_reciprocal(smallest: float) -> None:
    errors = {"a": [0.0, smallest, 2 * smallest], "b": [1e-10]}
    costs = {"a": [2.0, 1.0, 0.0], "b": [0.1]}
    for budget, chosen in ((2.1, 0), (1.1, 1), (0.1, 2)):
        assert solve(errors, costs, budget)["a"] == chosen
    alike = {"a": [2 * smallest, smallest, 0.0], "b": [0.0]}  # costs that only differ so little
    assert solve({"a": [0.0, 1.0, 2.0], "b": [0.0]}, alike, smallest)["a"] == 1


def test_never_infeasible_by_a_rounding_error() -> None:
    # three times 0.1 is above 0.3 in floating point by 1.1e-16, which is forgiven; 1e-8 is not
    errors = {name: [0.0, 1.0] for name in "abc"}
    costs = {name: [0.1, 0.0] for name in "abc"}
    assert set(solve(errors, costs, 0.3).values()) == {0}
    assert sum(solve(errors, costs, 0.3 - 1e-8).values()) == 1


def test_costs_closer_to_the_budget_than_the_solvers_tolerance() -> None:
    # HiGHS forgives 1e-6: half of these plans are over the budget by less than that
    rng = np.random.default_rng(0)
    names = [f"layer{index}" for index in range(10)]
    errors = {name: [0.0, float(rng.uniform(1, 2))] for name in names}
    costs = {name: [1.0 + float(rng.uniform(-1e-8, 1e-8)), 0.0] for name in names}
    error, cost = totals((errors, costs), solve(errors, costs, 5.0))
    assert cost <= 5.0 * (1 + RELATIVE_SLACK)
    assert error == pytest.approx(brute_force(errors, costs, 5.0)[0][0], rel=1e-12)


def test_an_infeasible_budget_names_the_cheapest_cost() -> None:
    with pytest.raises(InputError, match=r"at least the cheapest plan's 3 .* got 2.5"):
        solve({"a": [0.0, 1.0], "b": [0.0]}, {"a": [9.0, 1.0], "b": [2.0]}, 2.5)


def test_non_finite_errors_are_refused() -> None:
    with pytest.raises(InputError, match="errors of a must be finite"):
        solve({"a": [math.nan]}, {"a": [1.0]}, 1.0)


def test_tables_must_match() -> None:
    with pytest.raises(ValueError, match="must name the layers"):
        solve({"a": [0.0]}, {"b": [1.0]}, 1.0)
    with pytest.raises(ValueError, match="one number a choice"):
        solve({"a": [0.0]}, {"a": [1.0, 2.0]}, 1.0)


def random_tables(layers: int, choices: int) -> Tables:
    rng = np.random.default_rng(1)
    names = [f"layer{index}" for index in range(layers)]
    errors = {name: rng.uniform(size=choices).tolist() for name in names}
    costs = {name: rng.uniform(size=choices).tolist() for name in names}
    return errors, costs


def test_the_front_is_strict_exact_and_reaches_both_ends() -> None:
    tables = errors, costs = random_tables(5, 5)
    front = pareto_front(errors, costs, points=15, budgets=[1.0, -1.0])
    assert [p.cost for p in front] == sorted({p.cost for p in front})
    assert [p.error for p in front] == sorted({p.error for p in front}, reverse=True)
    assert front[0].cost == pytest.approx(sum(min(row) for row in costs.values()))
    assert front[-1].error == pytest.approx(sum(min(row) for row in errors.values()))
    for point in front:
        assert totals(tables, point.choice) == (point.error, point.cost)
        assert point.error == pytest.approx(brute_force(errors, costs, point.cost)[0][0])


def test_a_larger_model_is_within_the_linear_relaxation_bound() -> None:
    # an independent bound: the relaxed problem solved by scipy's linprog
    from scipy.optimize import linprog

    errors, costs = random_tables(40, 12)
    budget = 0.3 * 40
    one_each = np.kron(np.eye(40), np.ones(12))
    flat_costs = np.concatenate(list(costs.values()))[None, :]
    flat_errors = np.concatenate(list(errors.values()))
    relaxed = linprog(flat_errors, flat_costs, [budget], one_each, np.ones(40), bounds=(0, 1))
    error, cost = totals((errors, costs), solve(errors, costs, budget))
    assert cost <= budget * (1 + RELATIVE_SLACK)
    assert relaxed.fun <= error + 1e-9
    assert error <= relaxed.fun + 0.02  # the relaxation splits one layer between two choices
