"""The cost model of a budget, with what it must measure."""

from __future__ import annotations

import math

from ...calibrate.model import DiffusionModel
from ...calibrate.plan import QuantizationPlan
from ...calibrate.schemes import LayerScheme
from ...calibrate.search.budget import Budget, BudgetRequest, parse_budget
from ...calibrate.search.checkpoint_bytes import fixed_checkpoint_bytes
from ...calibrate.search.costs import (
    CostKind,
    CostModel,
    bitops_cost,
    bytes_cost,
    choice_costs,
    effective_bits_cost,
    latency_cost,
    tokens_per_image,
)
from ...calibrate.search.latency import needed_keys
from ...calibrate.search.space import SearchSpace
from ...errors import InputError
from ...progress import Progress
from ..latency_bench import measure_latencies
from ..options import ExportOptions
from ..single_linears import latency_target


def budget_of(
    options: ExportOptions,
    model: DiffusionModel,
    plan: QuantizationPlan,
    space: SearchSpace,
    progress: Progress,
) -> tuple[CostModel, Budget]:
    """The cost model of `--budget` and the budget as a number. `plan` is the uniform plan of the
    flags. Raises `InputError` for a budget that no plan of the space keeps."""
    request, scheme = parse_budget(options.budget), options.scheme()
    costs = _cost_model(request, options, model, plan, scheme, space, progress)
    budget = request.resolve(costs, model.linears, scheme)
    shares = choice_costs(costs, space)
    least = costs.fixed + math.fsum(min(row) for row in shares.values())
    if not budget.allows(least):
        raise InputError(
            f"the budget must be at least the cheapest plan's {least:.6g} {costs.unit}, got "
            f"{options.budget}; raise it or use fewer --bits"
        )
    return costs, budget


def _cost_model(
    request: BudgetRequest,
    options: ExportOptions,
    model: DiffusionModel,
    plan: QuantizationPlan,
    scheme: LayerScheme,
    space: SearchSpace,
    progress: Progress,
) -> CostModel:
    kind: CostKind = request.kind
    linears = model.linears
    if kind == "effective-bits":
        return effective_bits_cost(linears)
    if kind == "bytes":
        return bytes_cost(linears, fixed_checkpoint_bytes(model, plan))
    tokens = tokens_per_image(model)
    if kind == "bitops":
        return bitops_cost(linears, tokens)
    named = request.uniform_plan(linears, scheme, options.bits)
    schemes = {
        name: choices if named is None else (*choices, named[name])
        for name, choices in space.choices.items()
    }
    target = options.latency_target
    table = measure_latencies(
        needed_keys(linears, schemes, target, tokens),
        device=latency_device(options, model),
        threads=options.threads,
        progress=progress,
    )
    return latency_cost(linears, table, target, tokens)


def latency_device(options: ExportOptions, model: DiffusionModel) -> str:
    """Where linears are timed: the model's device, or a CPU for a target that knows only that."""
    devices = latency_target(options.latency_target).devices
    return "cpu" if devices == ("cpu",) else str(model.device)
