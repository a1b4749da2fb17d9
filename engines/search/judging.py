"""Judge plans by images: each is quantized as the export would, and sampled."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict

from ...calibrate.plan import QuantizationPlan
from ...calibrate.search.evaluation import evaluate_stored
from ...calibrate.search.executors.serial import SerialExecutor
from ...calibrate.search.fitness import CandidateFailure, Evaluator, Fitness, FitnessSettings
from ...calibrate.search.quantized_candidate import QuantizedCandidate
from ...calibrate.search.store import CandidateStore
from ...errors import StepError
from ...files import sha256_of_file, sha256_of_json
from ..fid_files import FidFiles
from .sizes import JUDGED_IMAGES
from .task import SearchTask

_AT_ONCE = 256  # images a denoiser call on a GPU


def judged_images(task: SearchTask) -> int:
    """How many images judge a plan: `--search-images`, else what the device can afford."""
    kind = "cuda" if task.on_gpu else "cpu"
    if task.options.search_method == "sensitivity" and task.options.search_images:
        return max(2, task.options.search_images)
    return JUDGED_IMAGES[kind]


def judge_plans(
    task: SearchTask, plans: Sequence[QuantizationPlan], files: FidFiles
) -> dict[str, Fitness]:
    """Fitness by plan digest. Judged plans are kept in the task's folder; failures raise."""
    images = judged_images(task)
    batch_size = min(images, _AT_ONCE) if task.on_gpu else min(images, task.batch_size)
    settings = FitnessSettings(task.sampling, images, batch_size)

    def build() -> Evaluator:
        candidate = QuantizedCandidate(
            task.model,
            task.options.weights,
            task.calibration,
            batch_size=task.batch_size,
            device=task.model.device,
        )
        return Evaluator(
            task.model,
            candidate,
            files.extractor,
            files.reference,
            settings,
            device=task.model.device,
        )

    store = CandidateStore(task.folder / "judged", _key(task, settings, files))
    found: dict[str, Fitness] = {}
    with closing(SerialExecutor(build)) as executor:
        outcomes = evaluate_stored(plans, executor, store)
        total = len({plan.digest for plan in plans})
        tracked = task.progress.track(outcomes, "judging plans by images", total)
        for plan, outcome, _stored in tracked:
            if isinstance(outcome, CandidateFailure):
                raise StepError(f"a plan of the search could not be judged: {outcome.reason}")
            found[plan.digest] = outcome
    return found


def _key(task: SearchTask, settings: FitnessSettings, files: FidFiles) -> str:
    return sha256_of_json(
        {
            "settings": settings.to_json(),
            "model": asdict(task.model.source),
            "weights": task.options.weights,
            "calibration": task.calibration.digest,
            "batch": task.batch_size,
            "device": task.model.device.type,
            "features": sha256_of_file(files.features_path) if files.features_path else None,
            "reference": sha256_of_file(files.reference_path) if files.reference_path else None,
        }
    )
