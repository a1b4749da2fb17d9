"""The search as a step of an export: finished once, resumed after a kill, free when repeated."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...calibrate.model import DiffusionModel
from ...calibrate.plan import LinearSpec, QuantizationPlan
from ...calibrate.schemes import LayerScheme
from ...calibrate.search.budget import Budget, parse_budget
from ...calibrate.search.costs import CostModel
from ...calibrate.search.space import Refuse, SearchSpace, search_space
from ...calibrate.search.weight_cache import build_weight_cache
from ...calibrate.trajectories import CalibrationSet
from ...errors import ArtifactError, InputError
from ...export.capabilities import TARGETS, target_named
from ...files import write_json
from ...memory import release_memory
from ...progress import Progress, Silent
from ..fid_files import load_fid_files
from ..options import ExportOptions
from ..report.search_schema import SEARCH_NAME, SearchEntry, read_search
from ..single_linears import check_device, latency_target
from ..targets.options import REFERENCE
from ..workspace import Workspace
from .budgets import budget_of, latency_device
from .found import Found
from .record import FRONT_FOLDER, FRONT_NAME, search_entry, write_front
from .task import SearchTask

PLAN_NAME = "plan.json"
_SECONDS = "seconds.json"
# Weights, measurements and judged plans, each under keys of its own: kept from one budget to the
# next, where the step's own folder starts empty.
_PARTS = "search-parts"


@dataclass(frozen=True)
class SearchJob:
    """A search to be done. `plan` is the uniform plan of the flags."""

    options: ExportOptions
    model: DiffusionModel
    plan: QuantizationPlan
    workspace: Workspace
    batch_size: int
    progress: Progress


def find_plan(job: SearchJob, calibration: CalibrationSet) -> tuple[QuantizationPlan, SearchEntry]:
    """The plan of `--search` and the record of how it was found; both land in the output folder.

    Raises `InputError` for a budget that cannot be kept and where nothing can be searched for.
    """
    space = space_of(job.options, job.model)

    def work(own: Path) -> None:
        _search(job, space, calibration, own)

    folder = job.workspace.run("search", _inputs(job, space, calibration), work)
    try:
        plan = QuantizationPlan.from_json(json.loads((folder / PLAN_NAME).read_text("utf-8")))
        entry = read_search(folder / SEARCH_NAME)
    except (OSError, ValueError, InputError, ArtifactError) as error:
        raise ArtifactError(
            f"the finished search in {folder} cannot be read ({error}); use --no-resume"
        ) from error
    if entry is None:
        raise ArtifactError(f"{folder} holds no {SEARCH_NAME}; use --no-resume")
    for name in (SEARCH_NAME, PLAN_NAME, FRONT_NAME):
        if (folder / name).is_file():
            job.workspace.output.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, job.workspace.output / name)
    if (folder / FRONT_FOLDER).is_dir():
        front = job.workspace.output / FRONT_FOLDER
        shutil.rmtree(front, ignore_errors=True)
        shutil.copytree(folder / FRONT_FOLDER, front)
    _say(job.progress, entry)
    return plan, entry


def forget_search(output: Path) -> None:
    """Remove an earlier search's record from an output folder that now takes a given plan. The plan
    files stay: `--plan` may name one of them."""
    (output / SEARCH_NAME).unlink(missing_ok=True)


def check_search(job: SearchJob) -> None:
    """Refuse what can be refused before calibration: nothing to search for, a budget that no plan
    keeps, a device that latency is not measured on. Latency is measured first and judged later."""
    space = space_of(job.options, job.model)
    if not _by_latency(job.options):
        budget_of(job.options, job.model, job.plan, space, job.progress)
    else:
        check_device(job.options.latency_target, latency_device(job.options, job.model))


def search_budget(
    options: ExportOptions, model: DiffusionModel, plan: QuantizationPlan
) -> tuple[CostModel, Budget]:
    """The cost model and the budget as a number, for who only wants to know."""
    return budget_of(options, model, plan, space_of(options, model), Silent())


def space_of(options: ExportOptions, model: DiffusionModel) -> SearchSpace:
    """What may be chosen: the groups that every target of the export can express and the target of
    a latency budget can run; the paper's method keeps both sides of a linear at one size. Raises
    `InputError` where the flags quantize nothing, or leave a linear without a choice."""
    scheme = options.scheme()
    if not scheme.quantizes_weights:
        raise InputError(
            f"a search needs quantized weights, got --bits {options.bits}; use w8a8, w4a8 or such"
        )
    refusals = _refusals(options)

    def refuse(spec: LinearSpec, scheme: LayerScheme) -> str | None:
        return next(filter(None, (one(spec, scheme) for one in refusals)), None)

    tied = options.search_method == "evolutionary"
    return search_space(model.linears, scheme, options.bits, refuse=refuse, tied=tied)


def _refusals(options: ExportOptions) -> list[Refuse]:
    """What leaves choices out. Not the targets where a plan may be degraded to what they can, nor
    those that write every plan (`realize`) or stand for the best of several."""
    refusals = [target_named(REFERENCE).refuse]
    if options.on_unsupported == "stop":
        named = [TARGETS[name] for name in options.target if name in TARGETS]
        refusals += [target.refuse for target in named if target.realize is None]
    if _by_latency(options):
        refusals.append(latency_target(options.latency_target).refuse)
    return refusals


def _by_latency(options: ExportOptions) -> bool:
    return parse_budget(options.budget).kind == "latency-ms"


def _inputs(job: SearchJob, space: SearchSpace, calibration: CalibrationSet) -> dict[str, Any]:
    """Everything that the result follows from. Workers and Ray do not change it."""
    options = job.options
    return {
        "model": asdict(job.model.source),
        "space": space.digest,
        "calibration": calibration.digest,
        "weights": options.weights,
        "method": options.search_method,
        "budget": options.budget,
        "pareto": options.pareto,
        "images": options.search_images,
        "refine": [options.search_refine, options.refine_by],
        "evolution": [options.search_population, options.search_generations],
        "latency_target": options.latency_target,
        "sampling": asdict(options.sampling()),
        "files": [str(options.fid_features), str(options.reference)],
        "batch": job.batch_size,
        "device": job.model.device.type,
    }


def _search(job: SearchJob, space: SearchSpace, calibration: CalibrationSet, folder: Path) -> None:
    started = time.perf_counter() - _seconds_before(folder)
    files = load_fid_files(job.options, job.model)
    try:
        task = make_task(job, space, calibration, job.workspace.folder / _PARTS)
        found = _method(job.options)(task, files)
    finally:
        write_json(folder / _SECONDS, round(time.perf_counter() - started, 3))
    if not task.budget.allows(task.costs.total(found.chosen)):
        raise ValueError("the search chose a plan beyond its budget")
    if job.options.pareto:
        write_front(task, found, folder)
    search_entry(task, found, time.perf_counter() - started).write(folder / SEARCH_NAME)
    found.chosen.write(folder / PLAN_NAME)
    release_memory()


def make_task(
    job: SearchJob, space: SearchSpace, calibration: CalibrationSet, folder: Path
) -> SearchTask:
    """Everything that a search method works on; the weights of all group sizes are made here.

    `folder` is where finished parts are kept. Raises `InputError` for an infeasible budget.
    """
    options, model, scheme = job.options, job.model, job.options.scheme()
    costs, budget = budget_of(options, model, job.plan, space, job.progress)
    cache = build_weight_cache(
        model,
        space,
        options.weights,
        calibration,
        batch_size=job.batch_size,
        device=model.device,
        progress=job.progress,
        folder=folder / "weights",
    )
    return SearchTask(
        options,
        model,
        scheme,
        space,
        costs,
        budget,
        cache,
        calibration,
        folder,
        job.batch_size,
        job.progress,
    )


def _method(options: ExportOptions) -> Callable[..., Found]:
    if options.search_method == "evolutionary":
        from .by_evolution import search_by_evolution

        return search_by_evolution
    from .by_sensitivity import search_by_sensitivity

    return search_by_sensitivity


def _seconds_before(folder: Path) -> float:
    """Seconds that a killed run of the same search had spent."""
    try:
        return float(json.loads((folder / _SECONDS).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return 0.0


def _say(progress: Progress, entry: SearchEntry) -> None:
    text = (
        f"{entry.method} search: {entry.cost:.6g} {entry.budget.unit} of {entry.budget.value:.6g} "
        f"({entry.effective_weight_bits:.3f} effective weight bits)"
    )
    chosen = entry.chosen
    if chosen is not None and chosen.psnr_db is not None:
        text += f", {chosen.psnr_db:.2f} dB on {entry.images} images"
        rivals = [own for own in entry.uniform if own.psnr_db is not None]
        text += "".join(f"; uniform g{own.group} {own.psnr_db:.2f} dB" for own in rivals)
    elif entry.predicted_psnr_db is not None:
        text += f", predicted {entry.predicted_psnr_db:.2f} dB"
    progress.say(f"{text}; {entry.seconds:.0f} s")
