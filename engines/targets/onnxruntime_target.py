"""An export's targets for ONNX Runtime: their files, their probes, and what is said of both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime

from ...calibrate.checkpoint import QuantizedCheckpoint
from ...calibrate.plan import LinearSpec, QuantizationPlan
from ...export.capabilities import computed_plan, realizations
from ...progress import Progress
from ..probe_check import probe_path
from ..report.targets_schema import TargetEntry
from ..session_settings import CPU, providers_of
from .onnxruntime_files import ON_CPU, ONNXRUNTIME_FILES, OnnxRuntimeFile
from .probe import make_probe


def as_computed(
    checkpoint: QuantizedCheckpoint, file: OnnxRuntimeFile = ON_CPU
) -> QuantizedCheckpoint:
    """The checkpoint with the plan that the file computes: what it is compared with."""
    plan = computed_plan(checkpoint.plan, checkpoint.linears, file.target)
    return checkpoint if plan is checkpoint.plan else replace(checkpoint, plan=plan)


def comparing_providers(file: OnnxRuntimeFile, device: str) -> list[str]:
    """What a finished file is compared by: its own provider where that is on `device`, else the
    CPU's, which runs every file."""
    here = device.startswith("cuda") and file.provider in onnxruntime.get_available_providers()
    return providers_of(file.provider if here else CPU)


def write_onnxruntime(
    checkpoint: QuantizedCheckpoint,
    file: OnnxRuntimeFile,
    output: Path,
    *,
    opset: int,
    device: str,
    progress: Progress,
) -> None:
    """Write the file and its probe; the old probe goes first, so that no other file keeps it."""
    path = file.path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    probe = probe_path(path)
    probe.unlink(missing_ok=True)
    file.exported(checkpoint, path, opset=opset, progress=progress)
    progress.say("computing the probe of the self-test")
    make_probe(as_computed(checkpoint, file), device, file.dtype).write(probe)


def notes_for(
    plan: QuantizationPlan, linears: Sequence[LinearSpec], target: str = ON_CPU.target
) -> tuple[str, ...]:
    """What the file does otherwise than the plan says, or slower than it could: a line a reason."""
    made = realizations(plan, linears, target)
    finer = Counter(
        (plan[name].label, found.scheme.label)
        for name, found in made.items()
        if found.scheme.quantizes_activations and not found.is_exact(plan[name])
    )
    unquantized = Counter(
        (plan[name].label, found.scheme.label)
        for name, found in made.items()
        if plan[name].quantizes_activations and not found.scheme.quantizes_activations
    )
    slow = Counter(found.reason for found in made.values() if not found.is_native())
    dtype = ONNXRUNTIME_FILES[target].dtype
    return (
        *(
            f"{target}: {count} linears quantize activations more finely, {old} → {new}; weights "
            "are the plan's"
            for (old, new), count in finer.items()
        ),
        *(
            f"{target}: {count} linears leave activations in {dtype}, {old} → {new}; weights are "
            "the plan's"
            for (old, new), count in unquantized.items()
        ),
        *(
            f"{target}: {count} linears stay as in model.onnx, because {reason}: they multiply in "
            "float32, and quantizing on top of it makes them slower than full precision"
            for reason, count in slow.items()
        ),
    )


def onnxruntime_entry(
    checkpoint: QuantizedCheckpoint,
    file: OnnxRuntimeFile,
    output: Path,
    asked: str,
    numbers: Mapping[str, Any],
    provider: str,
) -> TargetEntry:
    """The record of a finished file. numbers: how it compares, by `provider` (`file_check.py`)."""
    path, target = file.path(output), file.target
    data = path.with_name(f"{path.name}.data")
    made = realizations(checkpoint.plan, checkpoint.linears, target)
    return TargetEntry(
        name=target,
        asked=asked,
        checked_for=f"ONNX Runtime {onnxruntime.__version__}"
        + ("" if file.provider == CPU else f" by {provider}"),
        file=path.relative_to(output).as_posix(),
        bytes=sum(part.stat().st_size for part in (path, data) if part.is_file()),
        changes="; ".join(
            note.removeprefix(f"{target}: ")
            for note in notes_for(checkpoint.plan, checkpoint.linears, target)
        ),
        requested=dict(Counter(found.form for found in made.values())),
        no_engine="ONNX Runtime loads the file itself",
        **numbers,
    )
