"""Algorithm 1: counts, feasibility, determinism, resumption; fitness is a function one can see."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import numpy as np
import pytest

from qdit.calibrate.plan import LinearSpec, QuantizationPlan
from qdit.calibrate.schemes import LayerScheme
from qdit.calibrate.search.budget import Budget
from qdit.calibrate.search.costs import effective_bits_cost
from qdit.calibrate.search.evolution import EvolutionSettings, evolve, first_genome
from qdit.calibrate.search.feasibility import Feasibility, mean_group_at_least, within_budget
from qdit.calibrate.search.fitness import CandidateFailure, Fitness, Outcome
from qdit.calibrate.search.space import SearchSpace, search_space
from qdit.calibrate.search.store import CandidateStore
from qdit.errors import InputError, StepError

SMALL = EvolutionSettings(population=12, generations=4, top=4, crossover=6, mutation=6, seed=3)


class Rough:
    """Fitness without images: how coarse a plan is, each linear weighted as `seed` says.

    Plans come back in an order of the `order` seed; those of `broken` have no finite image, those
    of `failing` fail.
    """

    workers = 1

    def __init__(self, space: SearchSpace, order: int = 0) -> None:
        self.space = space
        self.weights = np.random.default_rng(5).uniform(size=len(space.linears))
        self.order = Random(order)
        self.seen: list[QuantizationPlan] = []
        self.outcomes: dict[int, Outcome] = {}

    def fid(self, plan: QuantizationPlan) -> float:
        sizes = [
            plan[spec.name].weight_group_size(spec.in_features)
            + plan[spec.name].activation_group_size(spec.in_features)
            for spec in self.space.linears
        ]
        return float(self.weights @ sizes)

    def evaluate(
        self, plans: Sequence[QuantizationPlan]
    ) -> Iterator[tuple[QuantizationPlan, Outcome]]:
        known = {plan.digest: self._outcome(plan) for plan in plans}
        shuffled = list(plans)
        self.order.shuffle(shuffled)
        for plan in shuffled:
            yield plan, known[plan.digest]

    def _outcome(self, plan: QuantizationPlan) -> Outcome:
        self.seen.append(plan)
        return self.outcomes.get(len(self.seen), Fitness(self.fid(plan), 20.0, 0.5))

    def close(self) -> None:
        return None


class Killed(Rough):
    """Is interrupted after `count` plans."""

    count = 30

    def evaluate(
        self, plans: Sequence[QuantizationPlan]
    ) -> Iterator[tuple[QuantizationPlan, Outcome]]:
        for pair in super().evaluate(plans):
            if self.count == 0:
                raise KeyboardInterrupt
            self.count -= 1
            yield pair


@pytest.fixture(scope="module")
def space(linears: list[LinearSpec]) -> SearchSpace:
    return search_space(linears, LayerScheme(), "w4a8")


@pytest.fixture(scope="module")
def feasible(space: SearchSpace, linears: list[LinearSpec]) -> Feasibility:
    return within_budget(space, effective_bits_cost(linears), Budget("effective-bits", 4.2))


def digests(result: object) -> list[str]:
    return [candidate.plan.digest for candidate in result.ranked]  # type: ignore[attr-defined]


class TestAlgorithm:
    def test_the_papers_settings_make_550_candidates(
        self, space: SearchSpace, feasible: Feasibility
    ) -> None:
        executor = Rough(space)
        result = evolve(space, feasible, EvolutionSettings(), executor)
        assert EvolutionSettings().candidates == 550
        assert len(result.ranked) == len(executor.seen) == 550
        assert len(set(digests(result))) == 550
        assert [record.evaluated for record in result.history] == list(range(50, 551, 50))

    def test_every_candidate_is_within_the_budget(
        self, space: SearchSpace, feasible: Feasibility, linears: list[LinearSpec]
    ) -> None:
        result = evolve(space, feasible, SMALL, Rough(space))
        bits = [c.plan.effective_weight_bits(linears) for c in result.ranked]
        assert max(bits) <= 4.2 * (1 + 1e-8)
        assert bits == pytest.approx([c.cost for c in result.ranked])

    def test_candidates_are_ranked_and_the_best_never_gets_worse(
        self, space: SearchSpace, feasible: Feasibility
    ) -> None:
        executor = Rough(space)
        result = evolve(space, feasible, SMALL, executor)
        fids = [candidate.fid for candidate in result.ranked]
        assert fids == sorted(map(executor.fid, executor.seen))
        best = [record.best_fid for record in result.history]
        assert best == sorted(best, reverse=True)
        assert best[-1] == fids[0] == executor.fid(result.best)

    def test_the_last_generation_is_ranked_too(
        self, space: SearchSpace, feasible: Feasibility
    ) -> None:
        result = evolve(space, feasible, SMALL, Rough(space))
        last = [c for c in result.ranked if c.generation == SMALL.generations]
        assert len(last) == SMALL.crossover + SMALL.mutation

    def test_it_beats_as_many_random_plans(self, space: SearchSpace, feasible: Feasibility) -> None:
        paper = EvolutionSettings()
        only_random = EvolutionSettings(population=paper.candidates, generations=0)
        found = evolve(space, feasible, paper, Rough(space)).ranked[0].fid
        assert found < evolve(space, feasible, only_random, Rough(space)).ranked[0].fid

    def test_neither_order_nor_chance_decides(
        self, space: SearchSpace, feasible: Feasibility
    ) -> None:
        first = evolve(space, feasible, SMALL, Rough(space, order=1))
        again = evolve(space, feasible, SMALL, Rough(space, order=2))
        other = EvolutionSettings(12, 4, 4, 6, 6, seed=4)
        assert digests(first) == digests(again)
        assert digests(first) != digests(evolve(space, feasible, other, Rough(space)))

    def test_a_small_space_is_searched_to_its_end(self, linears: list[LinearSpec]) -> None:
        few = search_space(linears[:2], LayerScheme(), "w4a8", groups=[32, 64, 96], tied=True)
        anything = mean_group_at_least(few, 32)
        result = evolve(few, anything, SMALL, Rough(few))
        assert len(result.ranked) == 9


class TestFirstCandidate:
    def test_uniform_g128_where_feasible(self, space: SearchSpace) -> None:
        feasible = mean_group_at_least(space, 32)
        assert first_genome(space, feasible) == space.uniform(128)

    def test_else_the_nearest_feasible_uniform(
        self, space: SearchSpace, linears: list[LinearSpec]
    ) -> None:
        costs = effective_bits_cost(linears)
        limit = costs.total(space.plan(space.uniform(192)))
        feasible = within_budget(space, costs, Budget("effective-bits", limit))
        assert not feasible(space.uniform(128))
        assert first_genome(space, feasible) == space.uniform(192)


class TestFailures:
    def test_failed_and_broken_candidates_rank_last_and_have_no_children(
        self, space: SearchSpace, feasible: Feasibility
    ) -> None:
        executor = Rough(space)
        executor.outcomes = {
            2: CandidateFailure("CUDA out of memory"),
            3: Fitness(math.inf, None, 1.0),
            20: CandidateFailure("killed"),
        }
        result = evolve(space, feasible, SMALL, executor)
        last = [candidate.outcome for candidate in result.ranked[-3:]]
        assert last[0] == Fitness(math.inf, None, 1.0)
        assert {c.outcome for c in result.failures} == set(last[1:])
        assert len(result.ranked) == SMALL.candidates

    @pytest.mark.parametrize(
        ("outcome", "message"),
        [
            (CandidateFailure("no GPU"), "judged: no GPU"),
            (Fitness(math.inf, None, 0.0), "NaN or infinity; use more bits"),
        ],
        ids=["failures", "broken-images"],
    )
    def test_a_population_without_a_fitness_ends_the_search(
        self, space: SearchSpace, feasible: Feasibility, outcome: Outcome, message: str
    ) -> None:
        executor = Rough(space)
        executor.outcomes = dict.fromkeys(range(1, 13), outcome)
        with pytest.raises(StepError, match=message):
            evolve(space, feasible, SMALL, executor)


class TestStore:
    def test_a_repeated_search_evaluates_nothing(
        self, tmp_path: Path, space: SearchSpace, feasible: Feasibility
    ) -> None:
        store = CandidateStore(tmp_path, "00" * 32)
        first = evolve(space, feasible, SMALL, Rough(space), store=store)
        idle = Rough(space)
        again = evolve(space, feasible, SMALL, idle, store=store)
        assert not idle.seen
        assert digests(again) == digests(first)
        assert again.history[-1].reused == SMALL.candidates
        assert again.history[-1].evaluation_seconds == 0.5 * SMALL.candidates

    def test_a_killed_search_goes_on_to_the_same_result(
        self, tmp_path: Path, space: SearchSpace, feasible: Feasibility
    ) -> None:
        store = CandidateStore(tmp_path, "00" * 32)
        with pytest.raises(KeyboardInterrupt):
            evolve(space, feasible, SMALL, Killed(space), store=store)
        assert len(store) == Killed.count
        rest = Rough(space)
        resumed = evolve(space, feasible, SMALL, rest, store=store)
        assert len(rest.seen) == SMALL.candidates - Killed.count
        assert digests(resumed) == digests(evolve(space, feasible, SMALL, Rough(space)))


@pytest.mark.parametrize(
    "changes",
    [
        {"population": 0},
        {"generations": -1},
        {"top": 0},
        {"mutation": 2.5},
        {"mutation_probability": 0.0},
        {"crossover_probability": 1.0},
        {"seed": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_illegal_settings_are_refused(changes: dict[str, object]) -> None:
    name = next(iter(changes)).replace("_", " ")
    with pytest.raises(InputError, match=rf"{name}.* must .*, got"):
        EvolutionSettings(**changes)  # type: ignore[arg-type]
