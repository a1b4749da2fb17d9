"""Evaluate plans with the store in front: each is known, or comes back from a worker and is stored.

Used by the evolutionary search and by whoever wants the fitness of a few plans (the refinement of
the solver's best, the uniform plans of the report).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..plan import QuantizationPlan
from .executors import Executor
from .fitness import Fitness, Outcome
from .store import CandidateStore


def evaluate_stored(
    plans: Sequence[QuantizationPlan], executor: Executor, store: CandidateStore | None
) -> Iterator[tuple[QuantizationPlan, Outcome, bool]]:
    """(plan, outcome, whether it came from the store), stored ones first, others as they finish.

    Equal plans are evaluated once. A fitness is on disk before it is yielded.
    """
    missing: list[QuantizationPlan] = []
    for plan in {plan.digest: plan for plan in plans}.values():
        known = store.get(plan) if store is not None else None
        if known is None:
            missing.append(plan)
        else:
            yield plan, known, True
    if not missing:  # no worker is woken for nothing
        return
    for plan, outcome in executor.evaluate(missing):
        if store is not None and isinstance(outcome, Fitness):
            store.put(plan, outcome)
        yield plan, outcome, False
