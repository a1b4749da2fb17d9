"""What either method of the search hands to its record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...calibrate.plan import QuantizationPlan
from ...calibrate.search.evolution_result import GenerationRecord
from ...calibrate.search.fitness import Fitness
from ...calibrate.search.sensitivity import ErrorTable


@dataclass(frozen=True)
class Labelled:
    """A plan that a person may want to look at, and how it is called."""

    label: str
    plan: QuantizationPlan


@dataclass(frozen=True)
class Found:
    """The chosen plan, what it was chosen from, and the figures of all of them.

    `fitness` is by plan digest and from `images` images each; `errors` predicts, where measured.
    """

    chosen: QuantizationPlan
    candidates: tuple[Labelled, ...]
    fitness: Mapping[str, Fitness]
    images: int
    errors: ErrorTable | None = None
    front: tuple[QuantizationPlan, ...] = ()
    history: tuple[GenerationRecord, ...] = field(default=())
