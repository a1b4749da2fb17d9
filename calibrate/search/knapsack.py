"""The multiple-choice knapsack: one choice a layer, least total error, total cost within a limit.

Exact, in three steps: dominated choices go; a Lagrangian bound removes every choice that no optimum
can hold (Pisinger, 'A minimal algorithm for the multiple-choice knapsack problem', EJOR 83, 1995,
keeps a core the same way); the mixed-integer solver HiGHS (by scipy) decides the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from ...errors import StepError
from .quiet_stdout import quiet_stdout

_BISECTIONS = 80
# Rounding room of the bounds, relative to the largest error sum: a choice that is in doubt stays.
_ROOM = 1e-10
# HiGHS stops at an absolute gap of 1e-6, which scipy does not let us set: the objective is scaled
# so that this is 1e-11 of its largest term. Rows have terms up to 1, where its own tolerances are
# meant for; what they let over a limit is found and cut off below.
_OBJECTIVE_SCALE = 1e5
_MOST_CUTS = 200
# For one proof of optimality. Measured on DiT-XL's 196 layers: 0.2 to 5 s, but minutes where all
# blocks are alike to a thousandth. scipy gives no plan back at a limit of nodes, only of seconds.
_MOST_SECONDS = 15.0
_LIMIT_REACHED = 1

Choice = tuple[int, ...]


@dataclass(frozen=True)
class Knapsack:
    """Errors, costs and tie-breaking costs [L][choices of the layer]; `limit` on Σ cost."""

    errors: tuple[np.ndarray, ...]
    costs: tuple[np.ndarray, ...]
    ties: tuple[np.ndarray, ...] | None
    limit: float

    def cost(self, choice: Choice) -> float:
        return total(self.costs, choice)

    def error(self, choice: Choice) -> float:
        return total(self.errors, choice)

    def tie(self, choice: Choice) -> float:
        return 0.0 if self.ties is None else total(self.ties, choice)


def total(values: tuple[np.ndarray, ...], choice: Choice) -> float:
    """Σ over layers, rounded once."""
    return math.fsum(row[gene] for row, gene in zip(values, choice, strict=True))


def cheapest(problem: Knapsack) -> Choice:
    """Each layer's cheapest choice, of equals the one with the least error."""
    return tuple(
        int(np.lexsort((errors, costs))[0])
        for errors, costs in zip(problem.errors, problem.costs, strict=True)
    )


def least_error(problem: Knapsack) -> Choice | None:
    """The exact optimum, or None where even the cheapest choices exceed the limit.

    Of equal errors the one of the least `ties` is taken, in a second exact solution. Where HiGHS
    cannot prove the optimum in `_MOST_SECONDS` the best feasible plan found is taken: blocks
    that are alike but for a thousandth leave thousands of plans within the last digits.
    """
    start = cheapest(problem)
    if problem.cost(start) > problem.limit:
        return None
    kept = [_undominated(problem, layer) for layer in range(len(problem.errors))]
    bound = _Bound(problem, kept, start)
    best = _first_better(problem, bound.core(bound.upper), bound.incumbent)
    if problem.ties is None:
        return best
    return _least_tie(problem, bound, best)


def _undominated(problem: Knapsack, layer: int) -> np.ndarray:
    """Positions of choices that no other one equals or beats in error, cost and tie at once."""
    columns = [problem.errors[layer], problem.costs[layer]]
    if problem.ties is not None:
        columns.append(problem.ties[layer])
    points = np.stack(columns, axis=1)
    order = np.lexsort(points.T[::-1])
    kept: list[int] = []
    for position in order:  # an earlier point of the order is never beaten by a later one
        if not any((points[other] <= points[position]).all() for other in kept):
            kept.append(int(position))
    return np.array(sorted(kept))


class _Bound:
    """Weak duality: Σ min_j(e + λc) − λ·limit is below every feasible error, for any λ ≥ 0."""

    def __init__(self, problem: Knapsack, kept: list[np.ndarray], start: Choice) -> None:
        self.kept = kept
        self._errors = [row[keep] for row, keep in zip(problem.errors, kept, strict=True)]
        self._costs = [row[keep] for row, keep in zip(problem.costs, kept, strict=True)]
        self.room = _ROOM * math.fsum(float(np.abs(row).max()) for row in self._errors)
        self.incumbent = self._improve(problem, self._descend(problem, start))
        self.upper = problem.error(self.incumbent)

    def _at(self, multiplier: float) -> Choice:
        priced = zip(self._errors, self._costs, self.kept, strict=True)
        return tuple(int(keep[np.argmin(e + multiplier * c)]) for e, c, keep in priced)

    def _descend(self, problem: Knapsack, start: Choice) -> Choice:
        """Bisect for the least multiplier whose choices are within the limit."""
        if problem.cost(free := self._at(0.0)) <= problem.limit:
            self.multiplier = 0.0
            self._reduce(problem.limit)
            return free
        low, high = 0.0, 1.0
        while problem.cost(self._at(high)) > problem.limit and high < 1e300:
            low, high = high, high * 16.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            within = problem.cost(self._at(middle)) <= problem.limit
            low, high = (low, middle) if within else (middle, high)
        self.multiplier = high
        self._reduce(problem.limit)
        found = self._at(high)
        return found if problem.cost(found) <= problem.limit else start

    def _reduce(self, limit: float) -> None:
        priced = [e + self.multiplier * c for e, c in zip(self._errors, self._costs, strict=True)]
        least = [float(row.min()) for row in priced]
        self.lower = math.fsum([*least, -self.multiplier * limit])
        self.room += _ROOM * self.multiplier * abs(limit)
        self._reduced = [row - value for row, value in zip(priced, least, strict=True)]

    def _improve(self, problem: Knapsack, choice: Choice) -> Choice:
        """Spend what is left: the single change of the largest gain, until none fits."""
        current = list(choice)
        while True:
            left = problem.limit - problem.cost(tuple(current))
            best = (0.0, -1, -1)
            for layer, gene in enumerate(current):
                gains = problem.errors[layer][gene] - problem.errors[layer]
                fits = problem.costs[layer] - problem.costs[layer][gene] <= left
                position = int(np.argmax(np.where(fits, gains, -np.inf)))
                if gains[position] > best[0]:
                    best = (float(gains[position]), layer, position)
            trial = [*current]
            if best[1] < 0:
                return tuple(current)
            trial[best[1]] = best[2]
            if problem.cost(tuple(trial)) > problem.limit:
                return tuple(current)  # the rounding of a difference misjudged the last digit
            current = trial

    def core(self, upper: float) -> list[np.ndarray]:
        """Choices that a plan of error ≤ `upper` can hold: the others' bound is above it."""
        gap = upper - self.lower + self.room
        return [
            keep[reduced <= gap] for keep, reduced in zip(self.kept, self._reduced, strict=True)
        ]


def _first_better(problem: Knapsack, core: list[np.ndarray], incumbent: Choice) -> Choice:
    found = _solve(problem, core, problem.errors, None)
    if found is None or problem.error(found) >= problem.error(incumbent):
        return incumbent
    return found


def _least_tie(problem: Knapsack, bound: _Bound, best: Choice) -> Choice:
    """Least tie-breaking cost among plans whose error equals the best one's but for rounding."""
    if problem.ties is None:
        return best
    most = problem.error(best) + bound.room
    found = _solve(problem, bound.core(most), problem.ties, most)
    if found is None or problem.tie(found) >= problem.tie(best):
        return best
    return found


def _solve(
    problem: Knapsack,
    core: list[np.ndarray],
    objective: tuple[np.ndarray, ...],
    most_error: float | None,
) -> Choice | None:
    """Least objective over `core` by HiGHS; None where nothing of the core is feasible.

    A solution that HiGHS's tolerance let over a limit is cut off by itself (at least one layer
    must differ) and the rest is solved again, so nothing else is lost.
    """
    if any(len(keep) == 0 for keep in core):
        return None
    layer_of = np.repeat(np.arange(len(core)), [len(keep) for keep in core])
    position = np.concatenate(core)
    rows = [_row(problem.costs, core, problem.limit)]
    if most_error is not None:
        rows.append(_row(problem.errors, core, most_error))
    one_each = (layer_of == np.arange(len(core))[:, None]).astype(float)
    constraints = [LinearConstraint(one_each, 1, 1)]
    constraints += [LinearConstraint(row, -np.inf, limit) for row, limit in rows]
    weights, _ = _row(objective, core, math.inf, _OBJECTIVE_SCALE)
    for _ in range(_MOST_CUTS):
        with quiet_stdout():
            result = milp(
                weights,
                integrality=np.ones(len(weights)),
                bounds=Bounds(0, 1),
                constraints=constraints,
                options={"mip_rel_gap": 0.0, "time_limit": _MOST_SECONDS},
            )
        if result.status == 2:
            return None
        if result.x is None and result.status == _LIMIT_REACHED:
            return None
        if result.x is None or result.status not in (0, _LIMIT_REACHED):
            raise StepError(f"the solver gave up on the group choice: {result.message}")
        taken = result.x > 0.5
        choice = tuple(int(gene) for gene in position[taken])
        within = problem.cost(choice) <= problem.limit
        if within and (most_error is None or problem.error(choice) <= most_error):
            return choice
        constraints.append(LinearConstraint(taken.astype(float), -np.inf, len(core) - 1))
    raise StepError(f"the solver found {_MOST_CUTS} plans a rounding error over the budget in turn")


def _row(
    values: tuple[np.ndarray, ...], core: list[np.ndarray], limit: float, most: float = 1.0
) -> tuple[np.ndarray, float]:
    """Values less each layer's least, in one row with terms up to `most`, and the limit less the
    sum of the least, on the same scale."""
    picked = [row[keep] for row, keep in zip(values, core, strict=True)]
    least = [float(row.min()) for row in picked]
    row = np.concatenate([part - base for part, base in zip(picked, least, strict=True)])
    left = limit - math.fsum(least)
    largest = float(row.max())
    if largest == 0:
        return row, left
    # divided first: the reciprocal of a denormal number is infinite
    return row / largest * most, left / largest * most
