"""Choose each layer's groups exactly: least total error under a budget, and the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import InputError
from ...progress import Progress, Silent
from .budget import RELATIVE_SLACK
from .knapsack import Choice, Knapsack, cheapest, least_error

_SILENT = Silent()
Table = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class FrontPoint:
    """An optimum: nothing of this cost or less has a smaller error. `choice` by layer."""

    cost: float
    error: float
    choice: dict[str, int]


def solve(
    errors: Table, costs: Table, budget: float, *, tie_break: Table | None = None
) -> dict[str, int]:
    """The position of each layer's choice: least Σ error with Σ cost ≤ `budget`, exactly.

    `budget` and `costs` are without the cost model's `fixed`. Rounding of sums is forgiven
    (`budget.RELATIVE_SLACK`), as `Budget.allows` does. Among plans of equal total error (to 1e-10
    of the largest sum) the one of least Σ `tie_break` is chosen, then too exactly. One exception:
    a proof of optimality that takes longer than 15 s ends with the best plan found, always within
    the budget (`knapsack.least_error` says when).

    Raises `InputError` that names the cheapest feasible cost where none is within the budget.
    """
    problem = _problem(errors, costs, budget, tie_break)
    choice = least_error(problem)
    if choice is None:
        least = problem.cost(cheapest(problem))
        raise InputError(
            f"the budget must be at least the cheapest plan's {least:.6g} (without what no choice "
            f"changes), got {budget:.6g}; raise it, or allow coarser groups or fewer bits"
        )
    return dict(zip(errors, choice, strict=True))


def pareto_front(
    errors: Table,
    costs: Table,
    *,
    points: int = 20,
    budgets: Sequence[float] = (),
    tie_break: Table | None = None,
    progress: Progress = _SILENT,
) -> tuple[FrontPoint, ...]:
    """Exact optima at `points` budgets spaced evenly from the cheapest to the finest plan's cost.

    `budgets` adds further ones (those of uniform plans, say); what is below the cheapest plan is
    left out. Costs rise and errors fall strictly: a budget whose optimum another point already
    gives adds none.
    """
    if points < 2:
        raise InputError(f"a front must have at least 2 points, got {points}")
    least_cost = _problem(errors, costs, 0.0, tie_break)
    low = least_cost.cost(cheapest(least_cost))
    high = least_cost.cost(_finest(least_cost))
    wanted = {float(value) for value in np.linspace(low, high, points)}
    wanted |= {float(value) for value in budgets if value >= low}
    found: list[FrontPoint] = []
    for budget in progress.track(sorted(wanted), "Pareto front", total=len(wanted)):
        problem = _problem(errors, costs, budget, tie_break)
        choice = least_error(problem)
        if choice is None:
            continue
        point = FrontPoint(
            problem.cost(choice), problem.error(choice), dict(zip(errors, choice, strict=True))
        )
        if not found or point.error < found[-1].error:
            found.append(point)
    return _strictly_better(found)


def _strictly_better(found: list[FrontPoint]) -> tuple[FrontPoint, ...]:
    """Points by cost, each with less error than all cheaper ones."""
    front: list[FrontPoint] = []
    for point in sorted(found, key=lambda point: (point.cost, point.error)):
        if not front or point.error < front[-1].error:
            front.append(point)
    return tuple(front)


def _finest(problem: Knapsack) -> Choice:
    """Each layer's choice of least error, of equals the cheapest."""
    return tuple(
        int(np.lexsort((costs, errors))[0])
        for errors, costs in zip(problem.errors, problem.costs, strict=True)
    )


def _problem(errors: Table, costs: Table, budget: float, tie_break: Table | None) -> Knapsack:
    return Knapsack(
        _arrays("errors", errors, errors),
        _arrays("costs", costs, errors),
        None if tie_break is None else _arrays("tie_break", tie_break, errors),
        budget + RELATIVE_SLACK * abs(budget),
    )


def _arrays(what: str, table: Table, errors: Table) -> tuple[np.ndarray, ...]:
    """Rows in the order of `errors`. Raises `ValueError` for tables that do not match."""
    if set(table) != set(errors):
        raise ValueError(f"{what} must name the layers of errors")
    rows = tuple(np.asarray(table[name], dtype=np.float64) for name in errors)
    for name, row in zip(errors, rows, strict=True):
        if row.shape != (len(errors[name]),) or not row.size:
            raise ValueError(f"{what} of {name} must have one number a choice, and a choice")
        if not np.isfinite(row).all():
            raise InputError(
                f"the {what} of {name} must be finite, got {row.tolist()}; measure them again"
            )
    return rows
