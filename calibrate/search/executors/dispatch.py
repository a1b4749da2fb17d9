"""Hand plans to workers that may die: what the executors with workers of their own have in common.

1. A worker that is ready takes the next plan; results are yielded as they finish.
2. A plan whose worker died, or which raised there, goes first in the queue for one second attempt.
   A dead worker is replaced, so that attempt runs on another one.
3. A plan that failed twice is reported as `CandidateFailure`; the others go on.
4. Where workers keep dying before they are ready, the search cannot go on: `StepError` with the
   last reason.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ....errors import StepError
from ...plan import QuantizationPlan
from ..fitness import CandidateFailure, Outcome

ATTEMPTS = 2


@dataclass(frozen=True)
class Ready:
    """A worker has built its evaluator and waits for a plan."""

    worker: int


@dataclass(frozen=True)
class Finished:
    """A worker has evaluated its plan and waits for the next."""

    worker: int
    outcome: Outcome


@dataclass(frozen=True)
class Died:
    """A worker is gone and the pool has started another in its place, with a number of its own."""

    worker: int
    reason: str


Event = Ready | Finished | Died


class WorkerPool(Protocol):
    """Workers by number. Numbers are never used twice."""

    @property
    def workers(self) -> int:
        """How many workers there are or are being started."""

    def idle(self) -> Sequence[int]:
        """The workers that are ready and have no plan."""

    def submit(self, worker: int, plan: QuantizationPlan) -> None:
        """Give an idle worker a plan. That it died meanwhile shows as an event."""

    def next_event(self) -> Event:
        """Wait for the next event. Raises `StepError` if none can come."""


def dispatch(
    plans: Sequence[QuantizationPlan], pool: WorkerPool
) -> Iterator[tuple[QuantizationPlan, Outcome]]:
    """Each plan with its outcome, as they finish."""
    waiting = deque((plan, 1) for plan in plans)
    running: dict[int, tuple[QuantizationPlan, int]] = {}
    dead_at_start = 0
    while waiting or running:
        for worker in pool.idle():
            if waiting:
                running[worker] = waiting.popleft()
                pool.submit(worker, running[worker][0])
        event = pool.next_event()
        if isinstance(event, Ready) or event.worker not in running:
            dead_at_start = _count_deaths(dead_at_start, event, pool.workers)
            continue
        plan, attempt = running.pop(event.worker)
        outcome = event.outcome if isinstance(event, Finished) else CandidateFailure(event.reason)
        if isinstance(outcome, CandidateFailure) and attempt < ATTEMPTS:
            waiting.appendleft((plan, attempt + 1))
        else:
            yield plan, outcome


def _count_deaths(count: int, event: Event, workers: int) -> int:
    """Deaths of workers without a plan since one became ready; `StepError` when they are many.

    Deaths on a plan need no limit: each plan may cost two workers and no more.
    """
    if not isinstance(event, Died):
        return 0
    if count >= ATTEMPTS * workers:
        raise StepError(
            f"workers of the search die before they begin ({count + 1} in a row), the last of: "
            f"{event.reason}; is there memory for {workers} at a time?"
        )
    return count + 1
