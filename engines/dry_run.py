"""`qdit-export --dry-run`: the plan, the sizes and a time estimate, with nothing written."""

from __future__ import annotations

from collections import Counter

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from ..calibrate.model import DiffusionModel
from ..calibrate.plan import QuantizationPlan
from ..progress import Progress
from .devices import default_batch_size
from .estimate import Estimate, estimate, measure_forward
from .export_job import default_output, prepare
from .options import ExportOptions
from .search.forecast import forecast
from .search.job import search_budget
from .targets.choice import choose
from .tensorrt.target import no_engine_reason

_MEGA = 1e6


def dry_run(options: ExportOptions, progress: Progress) -> Group:
    """Load the model, time one forward of it, and say what an export would do."""
    model, plan = prepare(options, progress)
    batch = options.batch_size or default_batch_size(model.device.type)
    predicted = estimate(options, model, measure_forward(model, min(batch, 8)))
    output = options.output or default_output(options, model)
    searched = [] if options.search_method == "none" else [_search_line(options, model, plan)]
    return Group(
        f"{model.name} → {output} (dry run: nothing is written)",
        *searched,
        *_target_lines(options, model),
        _plan_table(model, plan),
        _size_table(model, plan),
        _time_table(predicted),
        f"image pairs for PSNR and FID: {predicted.fid_samples}",
    )


def _search_line(options: ExportOptions, model: DiffusionModel, plan: QuantizationPlan) -> str:
    """What would be searched for. The tables show the plan of the flags, where a search starts."""
    costs, budget = search_budget(options, model, plan)
    counts = forecast(options, len(model.linears), model.device.type)
    measured = f"{counts.trajectories} measured trajectories, " if counts.trajectories else ""
    return (
        f"search: {options.search_method}, at most {budget.value:.6g} {costs.unit}; {measured}"
        f"{counts.plans} plans judged by images. Below: the plan of the flags"
    )


def _target_lines(options: ExportOptions, model: DiffusionModel) -> list[str]:
    """Which files of other runtimes there would be, and whether engines."""
    if not options.target or options.search_method != "none":
        return []
    choice = choose(options, options.plan_for(model), model.linears)
    names = ", ".join(choice.targets) or "none beside model.onnx"
    lines = [f"targets: {names}", *choice.notes]
    if any(name.startswith("tensorrt") for name in choice.targets):
        why = no_engine_reason(choice.features)
        engines = f"no engine: {why}" if why else "engines are built"
        lines.append(f"files are for TensorRT {choice.features.version}; {engines}")
    return [escape(line) for line in lines]  # reasons hold brackets, which are no markup


def _plan_table(model: DiffusionModel, plan: QuantizationPlan) -> Table:
    table = Table(title="Plan")
    for column in ("role", "scheme", "linears", "weights"):
        table.add_column(column, justify="left" if column in ("role", "scheme") else "right")
    linears: Counter[tuple[str, str]] = Counter()
    weights: Counter[tuple[str, str]] = Counter()
    for spec in model.linears:
        key: tuple[str, str] = (spec.role, plan[spec.name].label)
        linears[key] += 1
        weights[key] += spec.weight_count
    for key, count in linears.items():
        table.add_row(*key, str(count), f"{weights[key] / _MEGA:.2f} M")
    return table


def predicted_bytes(model: DiffusionModel, plan: QuantizationPlan) -> int:
    """Bytes of the checkpoint's tensors: integers, scales, zero points, the rest in float16."""
    specs = model.linears
    linears = sum(spec.weight_count for spec in specs)
    quantized = sum(
        plan[spec.name].effective_weight_bits(spec.in_features) * spec.weight_count / 8
        for spec in specs
    )
    return round(quantized + 2 * (model.parameter_count() - linears))


def _size_table(model: DiffusionModel, plan: QuantizationPlan) -> Table:
    full, quantized = 2 * model.parameter_count(), predicted_bytes(model, plan)
    table = Table(title="Sizes")
    table.add_column("what")
    table.add_column("MB", justify="right")
    table.add_row("full precision, float16", f"{full / _MEGA:.1f}")
    table.add_row("quantized checkpoint", f"{quantized / _MEGA:.1f}")
    table.add_row("ratio", f"{full / quantized:.2f} ×")
    bits = plan.effective_weight_bits(model.linears)
    table.add_row("effective weight bits", f"{bits:.3f}")
    return table


def _time_table(predicted: Estimate) -> Table:
    table = Table(title="Time, estimated from one measured forward", show_footer=True)
    table.add_column("step", footer="in all")
    table.add_column("seconds", justify="right", footer=f"{predicted.total:.0f}")
    for step, seconds in predicted.seconds.items():
        table.add_row(step, f"{seconds:.0f}")
    return table
