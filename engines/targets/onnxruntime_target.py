"""The `onnxruntime` target of an export: its file, its probe, and what is said of both."""

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
from ...export.onnxruntime.files import FILE, export_onnxruntime
from ...progress import Progress
from ..report.targets_schema import TargetEntry
from ..self_test import probe_path
from .probe import make_probe

NAME = "onnxruntime"


def target_path(output: Path) -> Path:
    """Where an export's folder holds the file."""
    return output / FILE


def as_computed(checkpoint: QuantizedCheckpoint) -> QuantizedCheckpoint:
    """The checkpoint with the plan that the file computes: what it is compared with."""
    plan = computed_plan(checkpoint.plan, checkpoint.linears, NAME)
    return checkpoint if plan is checkpoint.plan else replace(checkpoint, plan=plan)


def write_onnxruntime(
    checkpoint: QuantizedCheckpoint, path: Path, *, opset: int, device: str, progress: Progress
) -> None:
    """Write the file and its probe; the old probe goes first, so that no other file keeps it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    probe = probe_path(path)
    probe.unlink(missing_ok=True)
    export_onnxruntime(checkpoint, path, opset=opset, progress=progress)
    progress.say("computing the probe of the self-test")
    make_probe(as_computed(checkpoint), device).write(probe)


def notes_for(plan: QuantizationPlan, linears: Sequence[LinearSpec]) -> tuple[str, ...]:
    """What the file does otherwise than the plan says, or slower than it could: a line a reason."""
    made = realizations(plan, linears, NAME)
    finer = Counter(
        (plan[name].label, found.scheme.label)
        for name, found in made.items()
        if not found.is_exact(plan[name])
    )
    slow = Counter(found.reason for found in made.values() if not found.is_native())
    return (
        *(
            f"{NAME}: {count} linears quantize activations more finely, {old} → {new}; weights are "
            "the plan's"
            for (old, new), count in finer.items()
        ),
        *(
            f"{NAME}: {count} linears stay as in model.onnx, because {reason}: they multiply in "
            "float32, and quantizing on top of it makes them slower than full precision"
            for reason, count in slow.items()
        ),
    )


def onnxruntime_entry(
    checkpoint: QuantizedCheckpoint, output: Path, asked: str, numbers: Mapping[str, Any]
) -> TargetEntry:
    """The record of a finished file. numbers: how it compares, see `file_check.py`."""
    path = target_path(output)
    data = path.with_name(f"{path.name}.data")
    made = realizations(checkpoint.plan, checkpoint.linears, NAME)
    return TargetEntry(
        name=NAME,
        asked=asked,
        checked_for=f"ONNX Runtime {onnxruntime.__version__}",
        file=path.relative_to(output).as_posix(),
        bytes=sum(file.stat().st_size for file in (path, data) if file.is_file()),
        changes="; ".join(
            note.removeprefix(f"{NAME}: ")
            for note in notes_for(checkpoint.plan, checkpoint.linears)
        ),
        requested=dict(Counter(found.form for found in made.values())),
        no_engine="ONNX Runtime loads the file itself",
        **numbers,
    )
