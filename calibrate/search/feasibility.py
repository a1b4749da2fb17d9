"""Which genomes a search may look at, and how one that is too costly is repaired.

Every constraint here is a sum over linears with a limit, so one table of shares serves cost
budgets (costs.py) and the constraint of the paper's code, a mean group size of at least 128.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random

from ...errors import InputError
from ..plan import LinearSpec
from ..schemes import LayerScheme
from .budget import RELATIVE_SLACK, Budget
from .costs import CostModel, choice_costs
from .space import SearchSpace

Genome = tuple[int, ...]


@dataclass(frozen=True)
class Feasibility:
    """A genome is feasible when fixed + Σ shares[linear][gene] ≤ limit (rounding forgiven).

    `distances[linear][a][b]` says how far choice b is from choice a. Raises `InputError` at
    construction when even the cheapest genome exceeds the limit.
    """

    shares: tuple[tuple[float, ...], ...]
    distances: tuple[tuple[tuple[float, ...], ...], ...]
    fixed: float
    limit: float
    measure: str

    def __post_init__(self) -> None:
        cheapest = self.total(self.cheapest)
        if not self._allows(cheapest):
            raise InputError(
                f"{self.measure} must be at least {cheapest:.6g} for any plan of this search "
                f"space, got a limit of {self.limit:.6g}; raise the budget or allow coarser groups"
            )

    def __call__(self, genome: Sequence[int]) -> bool:
        return self._allows(self.total(genome))

    def total(self, genome: Sequence[int]) -> float:
        """The genome's cost in the limit's unit."""
        genes = zip(self.shares, genome, strict=True)
        return math.fsum([self.fixed, *(shares[gene] for shares, gene in genes)])

    @cached_property
    def cheapest(self) -> Genome:
        """The genome of least cost."""
        return tuple(shares.index(min(shares)) for shares in self.shares)

    def repair(self, genome: Sequence[int], random: Random) -> Genome:
        """A feasible genome near `genome`: random genes go one step down in cost until it fits.

        A step is to the next lower cost; of choices that cost the same, to the nearest one, so
        that a coarser weight group leaves the activation group as it is. Feasible genomes are
        returned as they are.
        """
        genes = list(genome)
        while not self(genes):
            reducible = [i for i, gene in enumerate(genes) if self._cheaper[i][gene] is not None]
            chosen = reducible[random.randrange(len(reducible))]
            step = self._cheaper[chosen][genes[chosen]]
            genes[chosen] = genes[chosen] if step is None else step
        return tuple(genes)

    def _allows(self, total: float) -> bool:
        return total <= self.limit + abs(self.limit) * RELATIVE_SLACK

    @cached_property
    def _cheaper(self) -> tuple[tuple[int | None, ...], ...]:
        """For each linear and choice the choice one step down in cost, None at the cheapest."""
        return tuple(
            tuple(_step_down(shares, distances[gene], gene) for gene in range(len(shares)))
            for shares, distances in zip(self.shares, self.distances, strict=True)
        )


def _step_down(shares: Sequence[float], distances: Sequence[float], gene: int) -> int | None:
    lower = [share for share in shares if share < shares[gene]]
    if not lower:
        return None
    level = max(lower)
    same_cost = [choice for choice, share in enumerate(shares) if share == level]
    return min(same_cost, key=lambda choice: (distances[choice], choice))


def within_budget(space: SearchSpace, costs: CostModel, budget: Budget) -> Feasibility:
    """Plans that cost at most the budget. Raises `InputError` where there is none."""
    if costs.kind != budget.kind:
        raise ValueError(f"a budget of {budget.kind} cannot bound a cost of {costs.kind}")
    shares = tuple(choice_costs(costs, space).values())
    return Feasibility(shares, _distances(space), costs.fixed, budget.value, costs.kind)


def mean_group_at_least(space: SearchSpace, size: int = 128) -> Feasibility:
    """Plans whose mean weight group, over the quantized linears, has at least `size` channels.

    The constraint of the authors' code. As a cost: Σ (largest − group) ≤ Σ (largest − size), in
    whole channels, so that nothing is rounded.
    """
    largest = max(max(_weight_sizes(space, spec)) for spec in space.linears)
    shares = tuple(
        tuple(float(largest - group) for group in _weight_sizes(space, spec))
        if _is_quantized(space, spec)
        else (0.0,) * len(space.choices[spec.name])
        for spec in space.linears
    )
    counted = sum(_is_quantized(space, spec) for spec in space.linears)
    limit = float(counted * (largest - size))
    return Feasibility(shares, _distances(space), 0.0, limit, "missing weight group channels")


def _is_quantized(space: SearchSpace, spec: LinearSpec) -> bool:
    return space.choices[spec.name][0].quantizes_weights


def _weight_sizes(space: SearchSpace, spec: LinearSpec) -> tuple[int, ...]:
    return tuple(s.weight_group_size(spec.in_features) for s in space.choices[spec.name])


def _distances(space: SearchSpace) -> tuple[tuple[tuple[float, ...], ...], ...]:
    return tuple(
        tuple(
            tuple(_distance(one, other, spec.in_features) for other in space.choices[spec.name])
            for one in space.choices[spec.name]
        )
        for spec in space.linears
    )


def _distance(one: LayerScheme, other: LayerScheme, k: int) -> float:
    """Octaves between both sides' group sizes, summed."""
    return abs(math.log2(one.weight_group_size(k) / other.weight_group_size(k))) + abs(
        math.log2(one.activation_group_size(k) / other.activation_group_size(k))
    )
