"""The record of a search: `search.json` for reports, `pareto.json` and its plans for `--plan`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ...calibrate.plan import QuantizationPlan
from ...calibrate.psnr import psnr
from ...calibrate.search.fitness import Fitness
from ...files import write_json
from ..report.search_schema import (
    BudgetEntry,
    CandidateEntry,
    FrontEntry,
    HistoryEntry,
    SearchEntry,
    UniformEntry,
)
from .found import Found
from .task import SearchTask
from .uniform import uniform_plans

FRONT_NAME, FRONT_FOLDER = "pareto.json", "pareto"


def search_entry(task: SearchTask, found: Found, seconds: float) -> SearchEntry:
    """Everything that the report shows of a search."""
    method = task.options.search_method
    if method == "none":
        raise ValueError("nothing was searched for")
    return SearchEntry(
        method=method,
        budget=BudgetEntry(
            kind=task.costs.kind,
            given=task.options.budget,
            value=task.budget.value,
            unit=task.costs.unit,
        ),
        cost=task.costs.total(found.chosen),
        effective_weight_bits=task.bits_of(found.chosen),
        predicted_mse=_predicted_mse(found, found.chosen),
        predicted_psnr_db=_predicted_psnr(found, found.chosen),
        seconds=round(seconds, 3),
        front=_front(task, found),
        uniform=tuple(
            UniformEntry(
                group=int(own.label[1:]),
                cost=task.costs.total(own.plan),
                effective_weight_bits=task.bits_of(own.plan),
                predicted_psnr_db=_predicted_psnr(found, own.plan),
                **_measured(found, own.plan),
            )
            for own in uniform_plans(task)
        ),
        candidates=tuple(
            CandidateEntry(
                label=own.label,
                cost=task.costs.total(own.plan),
                effective_weight_bits=task.bits_of(own.plan),
                predicted_psnr_db=_predicted_psnr(found, own.plan),
                chosen=own.plan.digest == found.chosen.digest,
                **_measured(found, own.plan),
            )
            for own in found.candidates
        ),
        history=tuple(
            HistoryEntry(
                generation=record.generation,
                evaluated=record.evaluated,
                seconds=record.evaluation_seconds,
                best_fid=_finite(record.best_fid),
            )
            for record in found.history
        ),
        images=found.images,
    )


def write_front(task: SearchTask, found: Found, folder: Path) -> None:
    """`pareto.json`, every point's cost and prediction, and its plan in a file of its own beside
    it (`pareto/03.json`), ready for `--plan`."""
    points = []
    for number, plan in enumerate(found.front):
        name = f"{FRONT_FOLDER}/{number:02d}.json"
        plan.write(folder / name)
        points.append(
            {
                "plan": name,
                "cost": task.costs.total(plan),
                "effective_weight_bits": task.bits_of(plan),
                "predicted_psnr_db": _predicted_psnr(found, plan),
            }
        )
    front = {"version": 1, "budget": task.costs.kind, "unit": task.costs.unit, "points": points}
    write_json(folder / FRONT_NAME, front)


def _front(task: SearchTask, found: Found) -> tuple[FrontEntry, ...]:
    return tuple(
        FrontEntry(
            cost=task.costs.total(plan),
            effective_weight_bits=task.bits_of(plan),
            predicted_psnr_db=_predicted_psnr(found, plan),
        )
        for plan in found.front
    )


def _measured(found: Found, plan: QuantizationPlan) -> dict[str, Any]:
    fitness: Fitness | None = found.fitness.get(plan.digest)
    if fitness is None:
        return {}
    return {"psnr_db": fitness.psnr_db, "fid": _finite(fitness.fid)}


def _predicted_mse(found: Found, plan: QuantizationPlan) -> float | None:
    if found.errors is None:
        return None
    return math.fsum(found.errors.of(name, scheme) for name, scheme in plan.layers.items())


def _predicted_psnr(found: Found, plan: QuantizationPlan) -> float | None:
    return psnr(_predicted_mse(found, plan))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
