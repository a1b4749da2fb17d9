"""Evaluation in this process, one candidate after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ...plan import QuantizationPlan
from ..fitness import CandidateFailure, Fitness, Outcome

Evaluate = Callable[[QuantizationPlan], Fitness]


class SerialExecutor:
    """Runs one evaluator. A candidate that raises is tried once more, then reported."""

    workers = 1

    def __init__(self, build: Callable[[], Evaluate]) -> None:
        self._build = build
        self._evaluator: Evaluate | None = None

    def evaluate(
        self, plans: Sequence[QuantizationPlan]
    ) -> Iterator[tuple[QuantizationPlan, Outcome]]:
        for plan in plans:
            evaluator = self._evaluator = self._evaluator or self._build()
            outcome = attempt(evaluator, plan)
            if isinstance(outcome, CandidateFailure):
                outcome = attempt(evaluator, plan)
            yield plan, outcome

    def close(self) -> None:
        self._evaluator = None  # and with it the model and the cache


def attempt(evaluator: Evaluate, plan: QuantizationPlan) -> Outcome:
    """The plan's fitness, or the reason why it has none."""
    try:
        return evaluator(plan)
    except Exception as error:  # whatever one candidate breaks must not end the others
        return CandidateFailure(describe(error))


def describe(error: BaseException) -> str:
    """'Class: first line of the message' of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
