"""Settings of the evolutionary search, and what it gives back."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...errors import InputError
from ..plan import QuantizationPlan
from .feasibility import Genome
from .fitness import CandidateFailure, Fitness, Outcome


@dataclass(frozen=True)
class EvolutionSettings:
    """The paper's by default: 50 + 10 × (25 + 25) = 550 candidates."""

    population: int = 50
    generations: int = 10
    top: int = 10
    crossover: int = 25
    mutation: int = 25
    mutation_probability: float = 0.1
    crossover_probability: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("population", 1), ("generations", 0), ("top", 1), ("seed", 0)):
            _check_count(name, getattr(self, name), low)
        for name in ("crossover", "mutation"):
            _check_count(f"{name} children", getattr(self, name), 0)
        for name in ("mutation_probability", "crossover_probability"):
            value = getattr(self, name)
            if not 0.0 < value < 1.0:
                raise InputError(
                    f"the {name.replace('_', ' ')} must lie between 0 and 1, got {value!r}"
                )

    @property
    def candidates(self) -> int:
        """How many plans are evaluated, where the space has as many."""
        return self.population + self.generations * (self.crossover + self.mutation)


def _check_count(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise InputError(f"the search's {name} must be an integer of at least {low}, got {value!r}")


@dataclass(frozen=True)
class GenerationRecord:
    """Where the search stood after a generation; generation 0 is the first population.

    evaluated: plans judged so far, `reused` of them from the store; seconds: wall time of this run;
    evaluation_seconds: what all evaluations took on their workers, stored ones included, so that
    the curve of quality against time survives a resumption.
    """

    generation: int
    evaluated: int
    reused: int
    seconds: float
    evaluation_seconds: float
    best_fid: float
    best_psnr_db: float | None


@dataclass(frozen=True)
class Candidate:
    """A plan that was judged, its cost in the constraint's unit, and its outcome."""

    plan: QuantizationPlan
    genome: Genome
    cost: float
    outcome: Outcome
    generation: int

    @property
    def fid(self) -> float:
        """Infinite for a failure and where no FID was computed."""
        known = self.outcome.fid if isinstance(self.outcome, Fitness) else None
        return math.inf if known is None else known

    @property
    def rank(self) -> tuple[float, bool, Genome]:
        """Sorts by FID, failures last; equal ones by genome, so that the order is one."""
        return (self.fid, isinstance(self.outcome, CandidateFailure), self.genome)


@dataclass(frozen=True)
class EvolutionResult:
    """`ranked` holds every candidate, best first; `history` one record a generation."""

    ranked: tuple[Candidate, ...]
    history: tuple[GenerationRecord, ...]

    @property
    def best(self) -> QuantizationPlan:
        return self.ranked[0].plan

    @property
    def failures(self) -> tuple[Candidate, ...]:
        return tuple(c for c in self.ranked if isinstance(c.outcome, CandidateFailure))
