"""The rules of dispatch, with workers whose every event the test decides."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import pytest

from qdit.calibrate.plan import QuantizationPlan
from qdit.calibrate.schemes import LayerScheme
from qdit.calibrate.search.executors.dispatch import Died, Event, Finished, Ready, dispatch
from qdit.calibrate.search.fitness import CandidateFailure, Fitness, Outcome
from qdit.errors import StepError

PLANS = [QuantizationPlan(str(number), {"linear": LayerScheme()}) for number in range(4)]


class Scripted:
    """Plans die or fail as often as `deaths` and `failures` say, by label; others succeed."""

    def __init__(self, count: int, deaths: dict[str, int], failures: dict[str, int]) -> None:
        self.deaths, self.failures = dict(deaths), dict(failures)
        self.workers = count
        self.next_number = count
        self.ready: list[int] = []
        self.events: deque[Event] = deque(Ready(number) for number in range(count))
        self.log: list[tuple[int, str]] = []

    def idle(self) -> Sequence[int]:
        return tuple(self.ready)

    def submit(self, worker: int, plan: QuantizationPlan) -> None:
        self.ready.remove(worker)
        self.log.append((worker, plan.bits))
        if self.deaths.get(plan.bits, 0):
            self.deaths[plan.bits] -= 1
            self.events.append(Died(worker, f"killed on {plan.bits}"))
            self.events.append(Ready(self.next_number))
            self.next_number += 1
        elif self.failures.get(plan.bits, 0):
            self.failures[plan.bits] -= 1
            self.events.append(Finished(worker, CandidateFailure(f"raised on {plan.bits}")))
        else:
            self.events.append(Finished(worker, Fitness(float(plan.bits), None, 0.0)))

    def next_event(self) -> Event:
        event = self.events.popleft()
        if not isinstance(event, Died):
            self.ready.append(event.worker)
        return event


def run(pool: Scripted) -> dict[str, Outcome]:
    return {plan.bits: outcome for plan, outcome in dispatch(PLANS, pool)}


EXPECTED = {plan.bits: Fitness(float(plan.bits), None, 0.0) for plan in PLANS}


@pytest.mark.parametrize("workers", [1, 2, 7])
@pytest.mark.parametrize(
    ("deaths", "failures"),
    [({}, {}), ({"1": 1}, {}), ({}, {"2": 1}), ({"0": 1, "3": 1}, {"1": 1})],
    ids=["undisturbed", "one-death", "one-failure", "some-of-each"],
)
def test_one_death_or_failure_costs_only_an_attempt(
    workers: int, deaths: dict[str, int], failures: dict[str, int]
) -> None:
    assert run(Scripted(workers, deaths, failures)) == EXPECTED


@pytest.mark.parametrize("workers", [1, 2])
def test_a_plan_that_kills_two_workers_is_reported_and_the_others_go_on(workers: int) -> None:
    pool = Scripted(workers, {"1": 9}, {})
    assert run(pool) == EXPECTED | {"1": CandidateFailure("killed on 1")}
    victims = [worker for worker, plan in pool.log if plan == "1"]
    assert len(set(victims)) == 2


def test_a_plan_that_raises_twice_is_reported() -> None:
    found = run(Scripted(2, {}, {"3": 9}))
    assert found == EXPECTED | {"3": CandidateFailure("raised on 3")}


def test_workers_that_die_before_they_begin_end_the_search() -> None:
    pool = Scripted(2, {}, {})
    pool.events = deque(Died(number, "out of memory") for number in range(99))
    with pytest.raises(StepError, match=r"die before they begin .5 in a row.*out of memory"):
        run(pool)


def test_results_of_an_evaluation_that_was_left_are_ignored() -> None:
    pool = Scripted(2, {}, {})
    left = dispatch(PLANS, pool)
    next(left)
    left.close()
    assert run(pool) == EXPECTED
