"""`--search sensitivity`: measure every linear once, solve exactly, judge a few near-optima."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from ...calibrate.plan import QuantizationPlan
from ...calibrate.search.costs import choice_costs
from ...calibrate.search.fitness import Fitness
from ...calibrate.search.local_errors import activation_shapes, weight_shapes
from ...calibrate.search.near_optima import near_optima
from ...calibrate.search.sensitivity import (
    ErrorTable,
    SensitivitySettings,
    measure_sensitivity,
)
from ...calibrate.search.solver import pareto_front
from ...calibrate.search.switchable import CandidateDenoiser
from ...calibrate.trajectories import CalibrationSet
from ...memory import release_memory
from ..fid_files import FidFiles
from .found import Found, Labelled
from .judging import judge_plans, judged_images
from .sizes import LEVEL_IMAGES, REFINE
from .task import SearchTask
from .uniform import uniform_plans

_LOCAL_SAMPLES = 16
_FRONT_POINTS = 20


def search_by_sensitivity(task: SearchTask, files: FidFiles) -> Found:
    """Choose a plan within the budget; `--search-refine 1` takes the solver's own unjudged."""
    device = task.model.device.type
    errors = _errors(task, LEVEL_IMAGES[device])
    release_memory()
    table, costs = errors.choice_errors(task.space), choice_costs(task.costs, task.space)
    tie_break = choice_costs(task.tie_break(), task.space)
    room = task.budget.value - task.costs.fixed
    refine = task.options.search_refine or REFINE["sensitivity"][device]
    choices = near_optima(table, costs, room, refine, seed=task.options.seed, tie_break=tie_break)
    candidates = tuple(
        Labelled("solver's optimum" if not number else f"near-optimum {number}", plan)
        for number, plan in enumerate(task.space.plan(tuple(c.values())) for c in choices)
    )
    fitness: dict[str, Fitness] = {}
    plans = [own.plan for own in candidates]
    others = [own.plan for own in uniform_plans(task)]
    if len(candidates) > 1:
        fitness = judge_plans(task, [*plans, *(others if task.on_gpu else others[-1:])], files)
    affordable = [plan for plan in others if task.costs.total(plan) <= task.budget.value]
    bound = fid_of_the_dearest(affordable, fitness, task.costs.total)
    chosen = best_plan(plans, fitness, task.options.refine_by, bound)
    budgets = [task.costs.total(plan) - task.costs.fixed for plan in others]
    front = pareto_front(
        table, costs, points=_FRONT_POINTS, budgets=budgets, progress=task.progress
    )
    return Found(
        chosen,
        candidates,
        fitness,
        judged_images(task) if fitness else 0,
        errors,
        tuple(task.space.plan(tuple(point.choice.values())) for point in front),
    )


def _errors(task: SearchTask, images: int) -> ErrorTable:
    model = task.model
    activations = activation_shapes(
        model, task.space, _spread(task.calibration), progress=task.progress
    )
    return measure_sensitivity(
        CandidateDenoiser(model, task.cache, device=model.device),
        task.space,
        weight_shapes(task.cache),
        activations,
        SensitivitySettings(task.sampling, images),
        batch_size=images,
        device=model.device,
        progress=task.progress,
        folder=task.folder,
    )


def _spread(calibration: CalibrationSet) -> CalibrationSet:
    """A few samples over all timesteps."""
    order = torch.argsort(calibration.timestep, stable=True)
    places = np.linspace(0, len(order) - 1, min(_LOCAL_SAMPLES, len(order))).round()
    chosen = order[torch.from_numpy(places.astype(np.int64))]
    return CalibrationSet(*(part[chosen] for part in calibration.tensors))


def fid_of_the_dearest(
    plans: Sequence[QuantizationPlan],
    fitness: Mapping[str, Fitness],
    cost: Callable[[QuantizationPlan], float],
) -> float | None:
    """FID of the dearest plan that was judged; None where none was, or without FID files."""
    judged = [plan for plan in plans if plan.digest in fitness]
    return fitness[max(judged, key=cost).digest].fid if judged else None


def best_plan(
    plans: Sequence[QuantizationPlan],
    fitness: Mapping[str, Fitness],
    by: str,
    fid_bound: float | None = None,
) -> QuantizationPlan:
    """The plan of the best images; the first (the solver's own) where nothing was judged.

    By PSNR only plans of a FID up to `fid_bound` are looked at, if there are any: over some hundred
    images the nearest to full precision may still have a higher FID than what it is to beat.
    """
    if not fitness:
        return plans[0]

    def rank(plan: QuantizationPlan) -> float:
        found = fitness[plan.digest]
        if by == "fid":
            return math.inf if found.fid is None else found.fid
        if found.fid == math.inf:  # images that are not finite
            return math.inf
        return -math.inf if found.psnr_db is None else -found.psnr_db

    def is_bounded(plan: QuantizationPlan) -> bool:
        fid = fitness[plan.digest].fid
        return fid_bound is None or (fid is not None and fid <= fid_bound)

    bounded = [plan for plan in plans if is_bounded(plan)]
    return min(bounded or plans, key=rank)
