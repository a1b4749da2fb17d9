"""Feasible genomes: every repair ends within the limit and touches no more than it must."""

from __future__ import annotations

from random import Random
from statistics import mean

import pytest

from qdit.calibrate.plan import LinearSpec
from qdit.calibrate.schemes import LayerScheme
from qdit.calibrate.search.budget import Budget
from qdit.calibrate.search.costs import effective_bits_cost
from qdit.calibrate.search.feasibility import mean_group_at_least, within_budget
from qdit.calibrate.search.space import SearchSpace, search_space
from qdit.errors import InputError


@pytest.fixture(scope="module")
def space(linears: list[LinearSpec]) -> SearchSpace:
    return search_space(linears, LayerScheme(), "w4a8")


def some_genome(space: SearchSpace, random: Random) -> tuple[int, ...]:
    return tuple(random.randrange(size) for size in space.sizes)


@pytest.mark.parametrize("limit", [4.07, 4.1, 4.25, 4.5])
def test_repair_keeps_the_budget_and_activations(
    space: SearchSpace, linears: list[LinearSpec], limit: float
) -> None:
    feasible = within_budget(space, effective_bits_cost(linears), Budget("effective-bits", limit))
    random = Random(0)
    for _ in range(50):
        before = some_genome(space, random)
        after = feasible.repair(before, random)
        assert space.plan(after).effective_weight_bits(linears) <= limit * (1 + 1e-8)
        for spec, old, new in zip(linears, before, after, strict=True):
            choices = space.choices[spec.name]
            assert choices[new].activation_group == choices[old].activation_group
        if feasible(before):
            assert after == before


def test_a_uniform_plans_own_cost_allows_that_plan(
    space: SearchSpace, linears: list[LinearSpec]
) -> None:
    costs = effective_bits_cost(linears)
    for group in (32, 64, 96, 192):
        genome = space.uniform(group)
        budget = Budget("effective-bits", costs.total(space.plan(genome)))
        assert within_budget(space, costs, budget)(genome)


def test_the_papers_constraint_is_a_mean_of_weight_groups(
    space: SearchSpace, linears: list[LinearSpec]
) -> None:
    feasible = mean_group_at_least(space, 128)
    random = Random(0)
    for _ in range(100):
        genome = some_genome(space, random)
        plan = space.plan(genome)
        average = mean(plan[spec.name].weight_group_size(spec.in_features) for spec in linears)
        assert feasible(genome) == (average >= 128)
        repaired = space.plan(feasible.repair(genome, random))
        assert mean(repaired[s.name].weight_group_size(s.in_features) for s in linears) >= 128


def test_the_mean_of_exactly_the_size_is_feasible(linears: list[LinearSpec]) -> None:
    space = search_space(linears, LayerScheme(), "w4a8", groups=[32, 64, 192])
    assert mean_group_at_least(space, 64)(space.uniform(64))
    assert not mean_group_at_least(space, 65)(space.uniform(64))


def test_a_limit_below_the_cheapest_plan_is_refused_with_its_cost(
    space: SearchSpace, linears: list[LinearSpec]
) -> None:
    cheapest = space.plan(space.uniform("channel")).effective_weight_bits(linears)
    with pytest.raises(InputError, match=rf"effective-bits must be at least {cheapest:.6g}"):
        within_budget(space, effective_bits_cost(linears), Budget("effective-bits", 4.0))
