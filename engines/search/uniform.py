"""The uniform plans that a search is compared with."""

from __future__ import annotations

from dataclasses import replace

from ...calibrate.plan import QuantizationPlan, uniform_plan
from ...calibrate.search.space import canonical_scheme
from ...errors import InputError
from .found import Labelled
from .sizes import UNIFORM_GROUPS
from .task import SearchTask


def uniform_plans(task: SearchTask) -> list[Labelled]:
    """g32, g64 and g128 on both sides, as far as they divide every linear, finest first."""
    made = []
    for group in UNIFORM_GROUPS:
        scheme = replace(task.scheme, weight_group=group, activation_group=group)
        try:
            plan = _as_choices(uniform_plan(task.options.bits, scheme, task.linears), task)
            task.costs.total(plan)  # a latency may not have been measured for it
        except InputError:
            continue
        made.append(Labelled(f"g{group}", plan))
    return made


def _as_choices(plan: QuantizationPlan, task: SearchTask) -> QuantizationPlan:
    """The plan in the space's words: a group as wide as the layer is 'channel' or 'token'."""
    layers = {
        spec.name: canonical_scheme(plan[spec.name], spec.in_features) for spec in task.linears
    }
    return QuantizationPlan(plan.bits, layers)
