"""Write what `--target` asked for: files, engines, and the record of both in targets.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...calibrate.calibration_set import CalibrationSet
from ...calibrate.checkpoint import QuantizedCheckpoint
from ...calibrate.input_ranges import collect_input_ranges
from ...errors import InputError, QditError, StepError
from ...files import sha256_of_file, write_json
from ...memory import release_memory
from ...progress import Progress
from ..report.targets_schema import TARGETS_NAME, TargetEntry, write_targets_file
from ..session_settings import CPU
from ..tensorrt.target import TensorRtFiles, facts_json, no_engine_reason, target_entry
from ..workspace import Workspace
from .choice import Choice
from .file_check import file_numbers
from .onnxruntime_files import ONNXRUNTIME_FILES, OnnxRuntimeFile
from .onnxruntime_target import (
    as_computed,
    comparing_providers,
    onnxruntime_entry,
    write_onnxruntime,
)
from .options import BEST, TargetOptions

RANGES_STEP = "input-ranges"
_RANGES = "ranges.json"
_FACTS = "facts.json"


@dataclass(frozen=True)
class TargetJob:
    """What the targets of one export share. samples: the calibration set, where there is one."""

    options: TargetOptions
    choice: Choice
    checkpoint: QuantizedCheckpoint
    samples: CalibrationSet | None
    workspace: Workspace
    device: str
    batch_size: int
    threads: int | None
    opset: int
    progress: Progress

    @property
    def output(self) -> Path:
        return self.workspace.output

    @property
    def weights_digest(self) -> str:
        return self.checkpoint.manifest.weights.sha256


def check_engine(options: TargetOptions, choice: Choice) -> None:
    """Raise `InputError` for engines that cannot be built as asked: by no machine, or, with
    `--require-engine`, by this one."""
    options.build_settings().check(choice.features)
    if options.hardware_compatible and "tensorrt-plugin" in choice.targets:
        raise InputError(
            "tensorrt-plugin embeds kernels of one GPU architecture, got --hardware-compatible; "
            "leave it out, or choose another target"
        )
    if not options.require_engine:
        return
    if why := no_engine_reason(choice.features):
        raise InputError(f"--require-engine: no TensorRT engine can be built: {why}")


def write_targets(job: TargetJob) -> tuple[TargetEntry, ...]:
    """Write every target of the choice, in its order, and targets.json beside the report.

    Finished files and engines that nothing has changed for are reused. Raises `StepError` where a
    file cannot be written or an engine cannot be built.
    """
    made = dict(_tensorrt_entries(job)) if any(map(_is_tensorrt, job.choice.targets)) else {}
    for target in job.choice.targets:
        if target in ONNXRUNTIME_FILES:
            made[target] = _onnxruntime_entry(job, ONNXRUNTIME_FILES[target])
    entries = tuple(made[target] for target in job.choice.targets)
    write_targets_file(entries, job.output / TARGETS_NAME)
    return entries


def _is_tensorrt(target: str) -> bool:
    return target.startswith(BEST)


def _onnxruntime_entry(job: TargetJob, file: OnnxRuntimeFile) -> TargetEntry:
    def write() -> None:
        write_onnxruntime(
            job.checkpoint,
            file,
            job.output,
            opset=job.opset,
            device=job.device,
            progress=job.progress,
        )

    computed = as_computed(job.checkpoint, file)
    path, providers = file.path(job.output), comparing_providers(file, job.device)
    inputs = {"opset": job.opset, "providers": providers}
    numbers = _write_file(job, file.target, path, inputs, write, computed, providers)
    asked = job.choice.asked[file.target]
    return onnxruntime_entry(job.checkpoint, file, job.output, asked, numbers, providers[0])


def _tensorrt_entries(job: TargetJob) -> Iterator[tuple[str, TargetEntry]]:
    files = TensorRtFiles(
        job.checkpoint,
        job.output,
        job.choice.features,
        job.options.build_settings(),
        _static_scales(job) if job.choice.needs_scales else {},
        job.progress,
    )
    why = no_engine_reason(files.features)
    if why:
        job.progress.say(f"no TensorRT engine is built: {why}")
    for target in filter(_is_tensorrt, job.choice.targets):
        inputs = {
            "features": asdict(files.features),
            "scales": dict(files.scales) if target == "tensorrt-int8" else {},
        }
        facts = _write_file(
            job, target, files.path(target), inputs, partial(files.write, target), job.checkpoint
        )
        built = None
        if not why:
            with job.workspace.timed(f"{target}-engine"):
                built = files.build(target)
        asked = job.choice.asked[target]
        yield target, target_entry(files, target, asked, built, why, facts)


def _write_file(
    job: TargetJob,
    target: str,
    path: Path,
    inputs: Mapping[str, Any],
    write: Callable[[], object],
    compared: QuantizedCheckpoint,
    providers: Sequence[str] = (CPU,),
) -> dict[str, Any]:
    """The target's file by `write`, unless it lies there finished; its numbers.

    inputs: what it follows from beside the weights; compared: what its simulation is made of;
    providers: what ONNX Runtime runs it by, to compare the two.
    """
    inputs = {"weights": job.weights_digest, **inputs}

    def work(folder: Path) -> None:
        try:
            write()
            job.progress.say(f"comparing {path.name} with the simulation")
            numbers = file_numbers(
                path,
                compared,
                job.samples,
                device=job.device,
                threads=job.threads,
                providers=providers,
            )
        except QditError:
            raise
        except Exception as error:
            raise StepError(f"the {target} file could not be written: {error}") from error
        write_json(folder / _FACTS, {"file": sha256_of_file(path), "numbers": numbers})
        release_memory()

    folder = job.workspace.run(target, inputs, work)
    facts = facts_json(folder / _FACTS)
    if not path.is_file() or facts.get("file") != sha256_of_file(path):
        job.progress.say(f"{path} is missing or not the one that was written; writing it again")
        job.workspace.forget(target)
        facts = facts_json(job.workspace.run(target, inputs, work) / _FACTS)
    numbers: dict[str, Any] = facts["numbers"]
    error = numbers["file_vs_simulation"]
    by = numbers.get("compared_by")  # steps finished by an older version have none
    job.progress.say(
        f"{target}: {error:.2g} from the simulation on {numbers['compared_inputs']} inputs"
        + (f", by {by}" if by else "")
    )
    return numbers


def _static_scales(job: TargetJob) -> dict[str, float]:
    """One scale an input, from the ranges that the simulation's linears read over the timesteps."""
    if job.samples is None:
        raise ValueError("static scales are calibrated; collect the calibration set first")
    samples, method = job.samples, job.options.static_scales
    plan = job.checkpoint.plan
    read = [s for s in job.checkpoint.linears if plan[s.name].quantizes_activations]
    if not read:
        return {}

    def work(folder: Path) -> None:
        ranges = collect_input_ranges(
            job.checkpoint.family,
            job.checkpoint.build_denoiser(job.device),
            read,
            samples,
            batch_size=job.batch_size,
            progress=job.progress,
        )
        bits = {spec.input_name: plan[spec.name].activation_bits for spec in read}
        record = {}
        for name, entry in ranges.items():
            scale = entry.static_scale(bits[name], method)
            record[name] = {
                "scale": scale,
                "clipped_share": entry.clipped_share(scale, bits[name]),
                "largest": entry.largest,
                "timesteps": {str(key): value for key, value in entry.timesteps.items()},
            }
        write_json(folder / _RANGES, record)
        release_memory()

    inputs = {"weights": job.weights_digest, "samples": samples.digest, "method": method}
    folder = job.workspace.run(RANGES_STEP, inputs, work)
    found = json.loads((folder / _RANGES).read_text(encoding="utf-8"))
    return {name: float(entry["scale"]) for name, entry in found.items()}
