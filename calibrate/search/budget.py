"""The budget of a search: 'KIND=VALUE', where VALUE may be what a uniform plan costs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...errors import InputError
from ..plan import LinearSpec, QuantizationPlan, uniform_plan
from ..schemes import GROUP_SIZES, ActivationGroup, LayerScheme
from .costs import COST_KINDS, CostKind, CostModel
from .space import SearchGroup

# Sums of the same shares in another order differ in the last digits; a plan is not refused for it.
RELATIVE_SLACK = 1e-9


@dataclass(frozen=True)
class Budget:
    """The most that a plan may cost, in the unit of the cost model of `kind`, `fixed` included."""

    kind: CostKind
    value: float

    def allows(self, total: float) -> bool:
        """Whether a plan of this total cost is within the budget, rounding of sums forgiven."""
        return total <= self.value * (1.0 + RELATIVE_SLACK)


@dataclass(frozen=True)
class BudgetRequest:
    """What a person asked for: a number, or a uniform plan's group size whose cost it shall be."""

    kind: CostKind
    value: float | None
    group: SearchGroup | None

    def __post_init__(self) -> None:
        if (self.value is None) == (self.group is None):
            raise ValueError("a budget is a value or a uniform plan's group, and one of them")

    def uniform_plan(
        self, linears: Sequence[LinearSpec], scheme: LayerScheme, bits: str
    ) -> QuantizationPlan | None:
        """The plan that the budget names, with this group on both sides; None for a number.

        Raises `InputError` where the group does not divide a linear's input channels.
        """
        if self.group is None:
            return None
        activation: ActivationGroup = "token" if self.group == "channel" else self.group
        both = replace(scheme, weight_group=self.group, activation_group=activation)
        return uniform_plan(bits, both, linears)

    def resolve(
        self, costs: CostModel, linears: Sequence[LinearSpec], scheme: LayerScheme
    ) -> Budget:
        """The budget as a number; all but the groups comes from `scheme`. Raises `InputError`."""
        if costs.kind != self.kind:
            raise ValueError(f"a budget of {self.kind} cannot be taken from a cost of {costs.kind}")
        if self.value is not None:
            return Budget(self.kind, self.value)
        plan = self.uniform_plan(linears, scheme, "uniform")
        if plan is None:
            raise ValueError("a budget without a value names a plan")
        return Budget(self.kind, costs.total(plan))


def parse_budget(text: str) -> BudgetRequest:
    """Parse 'effective-bits=4.25', 'bytes=3.5e8', 'bitops=g128' or 'latency-ms=channel'.

    Raises `InputError` for an unknown kind and for a value that is neither a positive finite
    number nor a group size with 'g' before it, nor 'channel'.
    """
    kind, equals, value = (part.strip() for part in text.partition("="))
    for known in COST_KINDS:
        if kind == known and equals:
            return _request(known, value)
    raise InputError(
        f"a budget must be KIND=VALUE with KIND one of {', '.join(COST_KINDS)}, got {text!r}; "
        "write effective-bits=4.25 or effective-bits=g128"
    )


def _request(kind: CostKind, value: str) -> BudgetRequest:
    if value == "channel":
        return BudgetRequest(kind, None, "channel")
    named = re.fullmatch(r"g(\d+)", value)
    if named is not None:
        if named[1] not in map(str, GROUP_SIZES):
            sizes = ", ".join(f"g{size}" for size in GROUP_SIZES)
            raise InputError(
                f"a uniform plan's budget must be one of {sizes} or channel, got {value!r}"
            )
        return BudgetRequest(kind, None, int(named[1]))
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise InputError(
            f"the budget of {kind} must be a positive number or a uniform plan such as g128 or "
            f"channel, got {value!r}"
        )
    return BudgetRequest(kind, number, None)
