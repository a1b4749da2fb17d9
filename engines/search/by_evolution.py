"""`--search evolutionary`: Algorithm 1 of Q-DiT on all workers at hand."""

from __future__ import annotations

from contextlib import closing

import torch

from ...calibrate.sampling import SamplingSettings
from ...calibrate.search.evolution import evolve
from ...calibrate.search.evolution_result import EvolutionResult, EvolutionSettings
from ...calibrate.search.executors import Executor, make_executor
from ...calibrate.search.feasibility import within_budget
from ...calibrate.search.fitness import PAPER_IMAGES, PAPER_STEPS, Fitness, FitnessSettings
from ...calibrate.search.payload import EvaluatorPayload, make_payload
from ...calibrate.search.store import CandidateStore
from ...errors import InputError
from ...files import sha256_of_json
from ..fid_files import FidFiles
from .by_sensitivity import best_plan
from .found import Found, Labelled
from .judging import judge_plans, judged_images
from .sizes import REFINE
from .task import SEED_OFFSET, SearchTask
from .uniform import uniform_plans

# on a GPU one batch is sampled beside another's features, and only the last one's are waited for
_AT_ONCE = {"cpu": 50, "cuda": 200}


def search_by_evolution(task: SearchTask, files: FidFiles) -> Found:
    """Evolve plans by FID; with `--search-refine N` the best N are quantized anew and judged."""
    settings = fitness_settings(task)
    payload = evaluator_payload(task, files, settings)
    result = _evolve(task, payload)
    refine = task.options.search_refine or REFINE["evolutionary"][task.model.device.type]
    ranked = tuple(
        Labelled(f"rank {number}", candidate.plan)
        for number, candidate in enumerate(result.ranked[:refine], 1)
    )
    fitness = {
        candidate.plan.digest: candidate.outcome
        for candidate in result.ranked[:refine]
        if isinstance(candidate.outcome, Fitness)
    }
    images = settings.samples
    if refine > 1:
        plans = [own.plan for own in ranked]
        others = [own.plan for own in uniform_plans(task)]
        fitness = judge_plans(task, [*plans, *others], files)
        images = judged_images(task)
    chosen = best_plan([own.plan for own in ranked], fitness, task.options.refine_by)
    chosen = result.best if refine == 1 else chosen
    return Found(chosen, ranked, fitness, images, history=result.history)


def fitness_settings(task: SearchTask) -> FitnessSettings:
    """The paper's: 800 images, 50 steps, no guidance; `--search-images` changes their number."""
    kind = task.model.device.type
    images = task.options.search_images or PAPER_IMAGES
    sampling = SamplingSettings(
        PAPER_STEPS, 1.0, task.options.seed + SEED_OFFSET, task.options.scheduler
    )
    return FitnessSettings(
        sampling, images, min(images, _AT_ONCE[kind]), paired_psnr=True, fast=task.on_gpu
    )


def evaluator_payload(
    task: SearchTask, files: FidFiles, settings: FitnessSettings
) -> EvaluatorPayload:
    """What judges a candidate, as data for any worker. Raises `InputError` without FID files."""
    if files.features_path is None or files.reference is None:
        raise InputError(
            f"the evolutionary search judges by FID, and {files.missing}; give both or use "
            "--search sensitivity"
        )
    return make_payload(
        task.model,
        task.cache,
        settings,
        features=files.features_path,
        reference=files.reference,
        threads=task.options.threads,
    )


def _evolve(task: SearchTask, payload: EvaluatorPayload) -> EvolutionResult:
    options = task.options
    feasible = within_budget(task.space, task.costs, task.budget)
    children = options.search_population
    settings = EvolutionSettings(
        population=options.search_population,
        generations=options.search_generations,
        top=max(1, children // 5),
        crossover=children // 2,
        mutation=children - children // 2,
        seed=options.seed,
    )
    key = sha256_of_json({"payload": payload.key, "device": task.model.device.type})
    store = CandidateStore(task.folder / "candidates", key)
    with closing(_executor(task, payload)) as executor:
        return evolve(task.space, feasible, settings, executor, store=store, progress=task.progress)


def _executor(task: SearchTask, payload: EvaluatorPayload) -> Executor:
    """Ray where an address was given, a process a GPU or worker where there are several."""
    options, device = task.options, str(task.model.device)
    if options.ray_address is not None:
        address = None if options.ray_address == "local" else options.ray_address
        return make_executor("ray", payload, workers=options.search_workers, ray_address=address)
    gpus = torch.cuda.device_count() if options.device in ("auto", "cuda") else 1
    workers = options.search_workers or (gpus if task.on_gpu else 1)
    if workers == 1:
        return make_executor("serial", payload, device=device)
    kind = "cuda" if task.on_gpu else "cpu"
    return make_executor("processes", payload, device=kind, workers=workers)
