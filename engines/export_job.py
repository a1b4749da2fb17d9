"""`qdit-export`: from a trained model to a verified ONNX file, in steps that survive a kill."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..calibrate.blockwise import quantize_model
from ..calibrate.checkpoint import QuantizedCheckpoint
from ..calibrate.model import DiffusionModel
from ..calibrate.plan import QuantizationPlan
from ..calibrate.sources import load_model
from ..calibrate.trajectories import (
    DEFAULT_PER_TRAJECTORY,
    CalibrationSet,
    collect_calibration_set,
)
from ..errors import InputError, StepError
from ..export.opsets import check_opset
from ..export.qdq import export_qdq
from ..memory import release_memory
from ..onnx_places import QDQ_FILE
from ..progress import Progress
from .devices import default_batch_size, resolve_device
from .full_precision import FullPrecision
from .options import ExportOptions
from .proof_engine import OnnxRuntimeProof
from .proof_job import ProofJob, prove_and_report
from .report.search_schema import SearchEntry
from .report.targets_schema import TargetEntry
from .search.job import SearchJob, check_search, find_plan, forget_search
from .smoothing import smooth_for_calibration
from .targets.choice import Choice, choose
from .targets.job import TargetJob, check_engine, write_targets
from .workspace import Workspace


@dataclass(frozen=True)
class Job:
    """What the steps of one export share."""

    options: ExportOptions
    model: DiffusionModel
    plan: QuantizationPlan
    workspace: Workspace
    progress: Progress
    search: SearchEntry | None = None  # how the plan was found

    @property
    def output(self) -> Path:
        return self.workspace.output

    @property
    def batch_size(self) -> int:
        return self.options.batch_size or default_batch_size(self.model.device.type)


def default_output(options: ExportOptions, model: DiffusionModel) -> Path:
    """build/<model>-<bits>, the model's name made fit for a folder."""
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in model.name).strip("-.")
    return Path("build") / f"{safe}-{options.bits}"


def prepare(options: ExportOptions, progress: Progress) -> tuple[DiffusionModel, QuantizationPlan]:
    """Load the model, build the plan and refuse what no step later could do."""
    check_opset(options.opset)
    options.check_search()
    options.check_targets()
    if options.smooth is not None and options.search_method != "none":
        raise InputError(
            f"a search measures the model without smoothing, got --smooth {options.smooth:g} and "
            f"--search {options.search_method}; leave one of them out"
        )
    device = resolve_device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model = load_model(options.model, device=device, seed=options.seed)
    plan = options.plan_for(model)
    if options.search_method == "none":
        plan = chosen_targets(options, model, plan, progress).plan
    progress.say(
        f"{model.name}: {model.parameter_count() / 1e6:.1f} M parameters on {device}, "
        f"{len(model.linears)} linears to {options.bits} "
        f"({plan.effective_weight_bits(model.linears):.3f} effective weight bits)"
    )
    return model, plan


def chosen_targets(
    options: ExportOptions, model: DiffusionModel, plan: QuantizationPlan, progress: Progress
) -> Choice:
    """What `--target` comes to for a plan, said in words; refused here where it cannot be had."""
    choice = choose(options, plan, model.linears)
    check_engine(options, choice)
    for note in choice.notes:
        progress.say(note)
    return choice


def run_export(options: ExportOptions, command: str, progress: Progress) -> bool:
    """Run the whole job; True when the gate passed. The report is written either way."""
    made = quantize_and_export(options, progress)
    release_memory()  # the quantized model goes before full precision is loaded again
    full = FullPrecision(partial(load_model, options.model, device=made.device, seed=options.seed))
    proof = ProofJob(
        full,
        made.checkpoint,
        OnnxRuntimeProof(
            made.path,
            options.dtype,
            threads=options.threads,
            fold_weights=not made.checkpoint.is_large,
        ),
        options,
        made.workspace,
        made.batch_size,
        progress,
        search=made.search,
        targets=made.targets,
        warnings=made.notes,
    )
    return prove_and_report(proof, command)


@dataclass(frozen=True)
class Exported:
    """What the proof needs of the first half of the job; the model that was loaded is not in it.

    Quantization replaced that model's linears, and two models are never held at once.
    """

    checkpoint: QuantizedCheckpoint
    path: Path
    workspace: Workspace
    device: str
    batch_size: int
    search: SearchEntry | None = None
    targets: tuple[TargetEntry, ...] = ()
    notes: tuple[str, ...] = ()


def quantize_and_export(options: ExportOptions, progress: Progress) -> Exported:
    """Load, quantize, write the checkpoint, `model.onnx` and the targets' files and engines.

    Finished steps are reused.
    """
    model, plan = prepare(options, progress)
    output = options.output or default_output(options, model)
    _check_output(output)
    job = Job(options, model, plan, Workspace(output, options.resume), progress)
    if options.search_method == "none":
        forget_search(output)
    else:
        job = with_plan_found(job)
    choice = choose(options, _plan_before_targets(job), model.linears)
    job = replace(job, plan=choice.plan)
    # collected before quantization, which replaces the model's linears
    samples = calibration_of(job) if choice.needs_scales else None
    checkpoint = quantize(job)
    path = export_onnx(job, checkpoint)
    targets = write_targets(_target_job(job, choice, checkpoint, samples))
    if job.workspace.reused:
        progress.say(f"reused finished steps: {', '.join(job.workspace.reused)}")
    return Exported(
        checkpoint,
        path,
        job.workspace,
        str(model.device),
        job.batch_size,
        job.search,
        targets,
        choice.notes,
    )


def _plan_before_targets(job: Job) -> QuantizationPlan:
    """The plan of the flags or of the search, before a target degrades it."""
    return job.options.plan_for(job.model) if job.search is None else job.plan


def _target_job(
    job: Job, choice: Choice, checkpoint: QuantizedCheckpoint, samples: CalibrationSet | None
) -> TargetJob:
    return TargetJob(
        job.options,
        choice,
        checkpoint,
        samples,
        job.workspace,
        str(job.model.device),
        job.batch_size,
        job.options.threads,
        job.options.opset,
        job.progress,
    )


def with_plan_found(job: Job) -> Job:
    """The job with the plan of its search."""
    search = SearchJob(
        job.options, job.model, job.plan, job.workspace, job.batch_size, job.progress
    )
    check_search(search)
    plan, entry = find_plan(search, calibration_of(job))
    return replace(job, plan=plan, search=entry)


def calibration_of(job: Job) -> CalibrationSet:
    """The calibration set of the job, from its workspace where it was collected before."""
    return _calibration_set(job, _calibrate(job))


def quantize(job: Job) -> QuantizedCheckpoint:
    """Calibrate and quantize; the checkpoint lands in the output folder."""
    inputs = _quantize_inputs(job)
    calibrating = job.options.weights == "gptq" or job.options.smooth is not None
    calibration_folder = _calibrate(job) if calibrating else None

    def work(folder: Path) -> None:
        calibration = None
        if calibration_folder is not None:
            calibration = _calibration_set(job, calibration_folder)
        if job.options.smooth is not None:
            smooth_for_calibration(
                job.model, calibration, job.options.smooth, job.batch_size, job.progress
            )
        result = quantize_model(
            job.model,
            job.plan,
            job.options.weights,
            calibration,
            batch_size=job.batch_size,
            device=job.model.device,
            progress=job.progress,
            folder=folder,
            compare_scales=True,
        )
        QuantizedCheckpoint.from_result(
            job.model,
            job.plan,
            result.weights,
            provenance=_provenance(job),
            metrics={name: error.to_json() for name, error in result.errors.items()},
        ).write(job.output)

    job.workspace.run("quantize", inputs, work)
    return _read_or_redo(job, inputs, work)


def _read_or_redo(job: Job, inputs: dict[str, Any], work: Any) -> QuantizedCheckpoint:
    """Read the checkpoint; where a finished one was deleted or damaged, make it again."""
    try:
        return QuantizedCheckpoint.read(job.output)
    except InputError as error:
        job.progress.say(f"the checkpoint in {job.output} is not usable ({error}); making it again")
        job.workspace.forget("quantize")
        job.workspace.run("quantize", inputs, work)
        return QuantizedCheckpoint.read(job.output)


def _calibrate(job: Job) -> Path:
    inputs = {
        "model": asdict(job.model.source),
        "sampling": asdict(job.options.sampling()),
        "samples": job.options.calib_samples,
        "batch": job.batch_size,
    }
    return job.workspace.run("calibration", inputs, lambda folder: _calibration_set(job, folder))


def _calibration_set(job: Job, folder: Path) -> CalibrationSet:
    """Collect the set, or take it from `folder` where it lies finished."""
    options = job.options
    return collect_calibration_set(
        job.model,
        options.sampling(),
        options.calib_samples,
        per_trajectory=min(DEFAULT_PER_TRAJECTORY, options.num_inference_steps),
        batch_size=job.batch_size,
        device=job.model.device,
        progress=job.progress,
        folder=folder,
    )


def export_onnx(job: Job, checkpoint: QuantizedCheckpoint) -> Path:
    """Write and check `model.onnx`."""
    path = job.output / QDQ_FILE
    inputs = _quantize_inputs(job) | {"dtype": job.options.dtype, "opset": job.options.opset}

    def work(folder: Path) -> None:
        try:
            export_qdq(
                checkpoint,
                path,
                dtype=job.options.dtype,
                opset=job.options.opset,
                progress=job.progress,
            )
        except InputError:
            raise
        except Exception as error:
            raise StepError(f"the ONNX export of {checkpoint.model_name} failed") from error

    if not path.exists():
        job.workspace.forget("onnx")
    job.workspace.run("onnx", inputs, work)
    return path


def _quantize_inputs(job: Job) -> dict[str, Any]:
    options = job.options
    inputs: dict[str, Any] = {
        "model": asdict(job.model.source),
        "plan": job.plan.to_json(),
        "weights": options.weights,
    }
    if options.smooth is not None:
        inputs["smooth"] = options.smooth
    if options.weights == "gptq" or options.smooth is not None:
        inputs |= {"sampling": asdict(options.sampling()), "samples": options.calib_samples}
    return inputs


def _provenance(job: Job) -> dict[str, Any]:
    options = job.options
    provenance: dict[str, Any] = {"weights": options.weights, "seed": options.seed}
    if options.smooth is not None:
        provenance["smooth"] = options.smooth
    if options.weights == "gptq" or options.smooth is not None:
        provenance["calibration"] = asdict(options.sampling()) | {"samples": options.calib_samples}
    return provenance


def _check_output(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise InputError(f"the output must be a folder, got the file {output}; choose another")
    parent = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not os.access(parent, os.W_OK):
        raise InputError(f"no permission to write in {parent}; choose another --output")
