"""Quality against time of both searches, judged alike: the evolutionary search's own fitness.

    qdit-export --bits w4a8 --search evolutionary --device cuda --output build/evo
    qdit-export --bits w4a8 --search sensitivity --device cuda --output build/sens
    python benchmarks/search_curves.py --evolutionary build/evo --sensitivity build/sens \
        --device cuda --json curves.json --plot docs/images/search-curves.svg

Both exports on the same machine. The evolutionary curve is in its search.json: best FID after each
generation, against the seconds that all evaluations took on their workers. The sensitivity search
never looks at that fitness; its plan is judged by it here, and so is full precision, which a plan
of a lower FID has left behind: the second panel is how near the images stay to it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt

from qdit.calibrate.plan import QuantizationPlan
from qdit.calibrate.search.fitness import Fitness
from qdit.engines.export_job import Job, calibration_of, prepare
from qdit.engines.fid_files import load_fid_files
from qdit.engines.options import ExportOptions
from qdit.engines.report.search_schema import SEARCH_NAME, SearchEntry, read_search
from qdit.engines.search.by_evolution import evaluator_payload, fitness_settings
from qdit.engines.search.job import PLAN_NAME, SearchJob, make_task, space_of
from qdit.engines.workspace import Workspace
from qdit.files import write_json
from qdit.progress import Terminal


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--evolutionary", type=Path, required=True)
    parser.add_argument("--sensitivity", type=Path, required=True)
    parser.add_argument("--model", default=None)
    parser.add_argument("--bits", default="w4a8")
    parser.add_argument("--images", type=int, help="--search-images of the evolutionary export")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def record_of(folder: Path) -> SearchEntry:
    record = read_search(folder / SEARCH_NAME)
    if record is None:
        raise SystemExit(f"{folder} holds no {SEARCH_NAME}; export with --search first")
    return record


FULL_PRECISION = "full precision"


def judge(arguments: argparse.Namespace, plans: dict[str, QuantizationPlan]) -> dict[str, Fitness]:
    """Each plan and full precision by the evolutionary fitness, with the weights that its
    candidates share."""
    options = ExportOptions(
        model=arguments.model,
        bits=arguments.bits,
        search="evolutionary",
        search_images=arguments.images,
        device=arguments.device,
    )
    with tempfile.TemporaryDirectory() as folder, Terminal(1) as progress:
        model, plan = prepare(options, progress)
        job = Job(options, model, plan, Workspace(Path(folder)), progress)
        search = SearchJob(options, model, plan, job.workspace, job.batch_size, progress)
        # both sides free, so that either search's plans can be put together
        free = options.model_copy(update={"search": "sensitivity"})
        space = space_of(free, model)
        task = make_task(search, space, calibration_of(job), Path(folder))
        files = load_fid_files(options, model)
        evaluator = evaluator_payload(task, files, fitness_settings(task)).build(model.device)
        judged = {label: evaluator(own) for label, own in plans.items()}
        if evaluator.full_precision is not None:
            judged[FULL_PRECISION] = evaluator.full_precision
        return judged


def plan_of(folder: Path) -> QuantizationPlan:
    return QuantizationPlan.from_json(json.loads((folder / PLAN_NAME).read_text("utf-8")))


def draw(
    path: Path, evolution: SearchEntry, sensitivity: SearchEntry, judged: dict[str, Fitness]
) -> None:
    """FID, and PSNR against full precision, over seconds; logarithmic in time."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    steps = [point for point in evolution.history if point.best_fid is not None]
    seconds = [point.seconds for point in steps]
    left.step(seconds, [p.best_fid for p in steps], where="post", marker="o", label="evolutionary")
    own = judged["sensitivity"]
    left.plot([sensitivity.seconds], [own.fid], "D", label="sensitivity")
    if (full := judged.get(FULL_PRECISION)) is not None:
        left.axhline(full.fid, color="gray", linestyle="--", label=FULL_PRECISION)
    left.set_ylabel(f"FID, {evolution.images} images")
    right.plot(
        [seconds[-1]], [judged["evolutionary"].psnr_db], "o", label="evolutionary, at its end"
    )
    right.plot([sensitivity.seconds], [own.psnr_db], "D", label="sensitivity")
    right.set_ylabel("PSNR against full precision, dB")
    for axes in (left, right):
        axes.set(xscale="log", xlabel="seconds on one worker")
        axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    arguments = parse()
    evolution, sensitivity = record_of(arguments.evolutionary), record_of(arguments.sensitivity)
    fitness = judge(
        arguments,
        {
            "evolutionary": plan_of(arguments.evolutionary),
            "sensitivity": plan_of(arguments.sensitivity),
        },
    )
    seconds = evolution.history[-1].seconds
    for label, own in fitness.items():
        psnr = "" if own.psnr_db is None else f", {own.psnr_db:.2f} dB"
        print(f"{label:>14}: FID {own.fid:.4f}{psnr}")
    print(
        f"evolutionary {seconds:.0f} s, sensitivity {sensitivity.seconds:.0f} s: "
        f"{seconds / sensitivity.seconds:.0f} times"
    )
    if arguments.json:
        judged = {label: asdict(own) for label, own in fitness.items()}
        history = [point.model_dump() for point in evolution.history]
        write_json(
            arguments.json,
            {"judged": judged, "evolutionary": history, "sensitivity_seconds": sensitivity.seconds},
        )
    if arguments.plot:
        draw(arguments.plot, evolution, sensitivity, fitness)


if __name__ == "__main__":
    main()
