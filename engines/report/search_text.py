"""What the report says of a granularity search in words and in its table."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...calibrate.schemes import UNQUANTIZED_BITS
from ...calibrate.search.budget import RELATIVE_SLACK
from . import numbers
from .schema import Report
from .search_schema import BudgetEntry, CandidateEntry, SearchEntry, UniformEntry

_METHODS = {
    "sensitivity": "chosen exactly from measured sensitivities",
    "evolutionary": "found by evolutionary search",
}
_MISSING = "–"
_DIGITS = 4


@dataclass(frozen=True)
class PlanRow:
    """One plan of the table. `cells` follow `PlanTable.columns`."""

    name: str
    chosen: bool
    cells: tuple[str, ...]


@dataclass(frozen=True)
class PlanTable:
    """The plans beside each other; columns that no plan has a figure for are left out."""

    columns: tuple[str, ...]
    rows: tuple[PlanRow, ...]


def cost_scale(budget: BudgetEntry) -> tuple[float, str]:
    """(divisor, unit): what costs are shown in. Bytes in MB, bit operations in powers of 1000."""
    if budget.kind == "bytes":
        return 1e6, "MB"
    if budget.kind == "bitops" and budget.value >= 1000:
        power = 3 * math.floor(math.log10(budget.value) / 3)
        return 10.0**power, f"10{numbers.superscript(power)} {budget.unit}"
    return 1.0, budget.unit


def cost_figure(value: float | None, budget: BudgetEntry) -> str:
    """The number alone, in the unit of `cost_scale`."""
    return _MISSING if value is None else numbers.plain(value / cost_scale(budget)[0], _DIGITS)


def cost_text(value: float, budget: BudgetEntry) -> str:
    """'4.125 bits per weight', '6.012 MB', '3.100 × 10¹² bit operations per image'."""
    divisor, unit = cost_scale(budget)
    times = "×\u00a0" if budget.kind == "bitops" and divisor > 1 else ""
    return f"{cost_figure(value, budget)}\u00a0{times}{unit}"


def same_cost(search: SearchEntry) -> UniformEntry | None:
    """The uniform plan to compare with: the costliest within the budget; None where none is.

    For a budget that names a uniform plan it is that plan.
    """
    limit = search.budget.value * (1 + RELATIVE_SLACK)
    within = [plan for plan in search.uniform if plan.cost is not None and plan.cost <= limit]
    return max(within, key=lambda plan: plan.cost or 0.0, default=None)


def uniform_name(plan: UniformEntry) -> str:
    return f"uniform {plan.group if plan.group == 'channel' else f'g{plan.group}'}"


def sentences(report: Report, search: SearchEntry) -> list[str]:
    """What was searched under which budget, what was found against a uniform plan, and the time.

    A figure that is missing is left out with its clause.
    """
    return [_asked(report, search), _found(search), *_compared(search), _took(search)]


def plan_table(search: SearchEntry) -> PlanTable:
    """The chosen plan, the other candidates judged by their images, and the uniform plans."""
    plans: list[tuple[str, CandidateEntry | UniformEntry]] = [
        (plan.label, plan) for plan in sorted(search.candidates, key=lambda plan: not plan.chosen)
    ]
    if search.chosen is None:
        plans.insert(0, ("chosen plan", _not_judged(search)))
    plans += [(uniform_name(plan), plan) for plan in search.uniform]
    cells = [_cells(plan, search) for _, plan in plans]
    columns = [name for name in cells[0] if any(row[name] != _MISSING for row in cells)]
    return PlanTable(
        tuple(columns),
        tuple(
            PlanRow(name, getattr(plan, "chosen", False), tuple(row[key] for key in columns))
            for (name, plan), row in zip(plans, cells, strict=True)
        ),
    )


def _asked(report: Report, search: SearchEntry) -> str:
    layers, budget = report.plan.layers, search.budget
    sides = "A weight group and an activation group"
    if not any(layer.activation_bits < UNQUANTIZED_BITS for layer in layers):
        sides = "A weight group"
    return (
        f"{sides} for each of {len(layers)} linears, {_METHODS[search.method]} within "
        f"{budget.given}: at most {cost_text(budget.value, budget)}."
    )


def _found(search: SearchEntry) -> str:
    parts, measured = [], []
    if search.predicted_psnr_db is not None:
        parts.append(f"predicted PSNR {_decibel(search.predicted_psnr_db)}")
    if search.chosen is not None and search.chosen.psnr_db is not None:
        measured.append(f"PSNR {_decibel(search.chosen.psnr_db)}")
    if search.chosen is not None and search.chosen.fid is not None:
        measured.append(f"FID {numbers.plain(search.chosen.fid, _DIGITS)}")
    if measured:
        images = f"{numbers.count(search.images)} image pairs"
        parts.append(f"{_listed(measured)} measured on {images}")
    return f"{'; '.join([f'The chosen plan: {cost_text(search.cost, search.budget)}', *parts])}."


def _compared(search: SearchEntry) -> list[str]:
    plan = same_cost(search)
    if plan is None or plan.cost is None:
        return ["No uniform plan lies within this budget."] if search.uniform else []
    cost = cost_figure(plan.cost, search.budget)
    parts = []
    gain = _difference(search.predicted_psnr_db, plan.predicted_psnr_db)
    if gain is not None:
        parts.append(f"{_signed(gain)}\u00a0dB predicted")
    if search.chosen is not None:
        gain = _difference(search.chosen.psnr_db, plan.psnr_db)
        if gain is not None:
            parts.append(f"{_signed(gain)}\u00a0dB measured")
        gain = _difference(search.chosen.fid, plan.fid)
        if gain is not None:
            parts.append(f"{_signed(gain)} FID")
    if not parts:
        return []
    name = uniform_name(plan)
    return [
        f"Against {name}, the costliest uniform plan within the budget ({cost}): {_listed(parts)}."
    ]


def _took(search: SearchEntry) -> str:
    evaluated = max((entry.evaluated for entry in search.history), default=0)
    over = f" over {numbers.count(evaluated)} candidates" if evaluated else ""
    return f"The search took {numbers.seconds(search.seconds)}{over}."


def front_note(search: SearchEntry) -> str:
    """How to read the marks that the picture of cost against quality holds."""
    plans: list[CandidateEntry | UniformEntry] = [*search.uniform, *search.candidates]
    predictions = [search.predicted_psnr_db, *(plan.predicted_psnr_db for plan in plans)]
    predictions += [point.predicted_psnr_db for point in search.front]
    note = "PSNR of images against full precision."
    if any(figure is not None for figure in predictions):
        note += " Line and filled marks: predicted, the sum of what single linears do to images."
    if any(plan.psnr_db is not None for plan in plans):
        note += f" Hollow marks: measured on {numbers.count(search.images)} image pairs."
    return note


def _cells(plan: CandidateEntry | UniformEntry, search: SearchEntry) -> dict[str, str]:
    cost = {f"Cost, {cost_scale(search.budget)[1]}": cost_figure(plan.cost, search.budget)}
    bits = {"Bits a weight": f"{plan.effective_weight_bits:.3f}"}
    return {
        **({} if search.budget.kind == "effective-bits" else bits),
        **cost,
        "Predicted PSNR, dB": _two_places(plan.predicted_psnr_db),
        "PSNR, dB": _two_places(plan.psnr_db),
        "FID": numbers.plain(plan.fid, _DIGITS),
    }


def _not_judged(search: SearchEntry) -> CandidateEntry:
    """The chosen plan as a row, where no candidate was judged by its images."""
    return CandidateEntry(
        label="chosen plan",
        cost=search.cost,
        effective_weight_bits=search.effective_weight_bits,
        predicted_psnr_db=search.predicted_psnr_db,
        chosen=True,
    )


def _difference(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def _decibel(value: float) -> str:
    return f"{_two_places(value)}\u00a0dB"


def _two_places(value: float | None) -> str:
    """Of decibels: a search is about tenths of one."""
    return _MISSING if value is None else f"{value:.2f}".replace("-", "−")


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _listed(parts: list[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"
