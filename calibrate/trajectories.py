"""Collect the calibration set: states (x_t, t, y) on the model's own sampling trajectories.

Full-precision trajectories under the model's scheduler with guidance; of each, the conditional
inputs at a few steps are kept (method.md, 'Calibration set'). Labels are random, and the noise
is never that of an image which is later sampled for evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import ArtifactError, InputError
from ..files import canonical_json, sha256_of_json
from ..progress import Progress, Silent
from .calibration_set import CalibrationSet, metadata_of
from .model import DiffusionModel
from .sampling import SamplingSettings, sample_images
from .schedulers import make_scheduler, set_steps

__all__ = ["CalibrationSet", "collect_calibration_set", "spread_steps"]

FILE_NAME = "calibration.safetensors"
SET_VERSION = 1
DEFAULT_PER_TRAJECTORY = 8
# Sample indices decide noise and label; evaluation counts from 0 and never comes this far.
FIRST_TRAJECTORY = 1 << 40
_SILENT = Silent()


def spread_steps(samples: int, per_trajectory: int, steps: int) -> list[list[int]]:
    """The steps kept of each of ceil(samples / per_trajectory) trajectories.

    Sample m belongs to trajectory m mod J and is taken at step floor(m · steps / samples): every
    trajectory's samples are spread evenly, each with its own offset, and the set as a whole takes
    every step equally often (to within one).
    """
    trajectories = -(-samples // per_trajectory)
    chosen: list[list[int]] = [[] for _ in range(trajectories)]
    for sample in range(samples):
        chosen[sample % trajectories].append(sample * steps // samples)
    return chosen


def collect_calibration_set(
    model: DiffusionModel,
    settings: SamplingSettings,
    samples: int,
    *,
    per_trajectory: int = DEFAULT_PER_TRAJECTORY,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    progress: Progress = _SILENT,
    folder: Path | None = None,
) -> CalibrationSet:
    """`samples` inputs of the full-precision denoiser, `per_trajectory` from each trajectory.

    `batch_size` trajectories run at once on `device`, to which the denoiser moves. With `folder`
    the set is saved there, taken from there if it was made from the same model by the same
    settings, and an interrupted collection goes on after its last finished batch.
    Raises `InputError` unless 1 ≤ samples and 1 ≤ per_trajectory ≤ steps.
    """
    steps = len(
        set_steps(
            make_scheduler(model.scheduler_config, settings.scheduler),
            settings.num_inference_steps,
        )
    )
    _check_counts(samples, per_trajectory, steps, batch_size)
    chosen = spread_steps(samples, per_trajectory, steps)
    request = {
        "version": SET_VERSION,
        "source": asdict(model.source),
        "scheduler_config": model.scheduler_config,
        "sampling": asdict(settings),
        "samples": samples,
        "per_trajectory": per_trajectory,
    }
    metadata = {"request": canonical_json(request), "key": sha256_of_json(request)}
    if folder is not None and (saved := _saved(folder / FILE_NAME, metadata)):
        progress.say(f"calibration set of {samples} samples taken from {folder / FILE_NAME}")
        return saved
    model.denoiser.to(device)
    parts = []
    starts = range(0, len(chosen), batch_size)
    for start in progress.track(starts, "collecting calibration inputs", len(starts)):
        batch = chosen[start : start + batch_size]
        path = None if folder is None else folder / f"calibration-{start:05d}.part.safetensors"
        own = metadata | {"trajectories": f"{start}+{len(batch)}"}
        part = None if path is None else _saved(path, own)
        if part is None:
            part = _run_trajectories(model, settings, start, batch, device)
            if path is not None:
                part.write(path, own)
        parts.append(part)
    collected = CalibrationSet.concatenate(parts)
    if folder is not None:
        collected.write(folder / FILE_NAME, metadata)
        for leftover in folder.glob("calibration-*.part.safetensors"):
            leftover.unlink()
    return collected


def _check_counts(samples: int, per_trajectory: int, steps: int, batch_size: int) -> None:
    for what, value in (("calibration samples", samples), ("the batch size", batch_size)):
        if value < 1:
            raise InputError(f"{what} must be at least 1, got {value}")
    if not 1 <= per_trajectory <= steps:
        raise InputError(
            f"calibration samples per trajectory must be between 1 and its {steps} steps, "
            f"got {per_trajectory}"
        )


def _saved(path: Path, metadata: dict[str, str]) -> CalibrationSet | None:
    """The set at `path` if it is there, sound, and of this very metadata."""
    if metadata_of(path) != metadata:
        return None
    try:
        return CalibrationSet.read(path)
    except ArtifactError:
        return None


def _trajectory_index(trajectory: int, class_count: int, seed: int) -> int:
    """The sample index that gives this trajectory fresh noise and its random label.

    Sampling takes the label as index mod `class_count`, so a random label is a choice among
    `class_count` neighbouring indices.
    """
    label = int(np.random.default_rng([seed, trajectory]).integers(class_count))
    return (FIRST_TRAJECTORY + trajectory) * class_count + label


def _run_trajectories(
    model: DiffusionModel,
    settings: SamplingSettings,
    first: int,
    chosen: Sequence[Sequence[int]],
    device: torch.device | str,
) -> CalibrationSet:
    """Sample trajectories `first` … and keep their inputs at the `chosen` steps of each."""
    class_count = model.family.class_count(model.denoiser)
    indices = [
        _trajectory_index(first + row, class_count, settings.seed) for row in range(len(chosen))
    ]
    kept: list[CalibrationSet] = []

    def keep(position: int, timestep: int, x: Tensor, labels: Tensor) -> None:
        rows = [row for row, steps in enumerate(chosen) if position in steps]
        if rows:
            picked = x[rows].float().cpu()
            timesteps = torch.full((len(rows),), timestep, dtype=torch.int64)
            kept.append(CalibrationSet(picked, timesteps, labels[rows].cpu()))

    sample_images(
        model,
        model.as_denoiser(),
        settings,
        indices,
        batch_size=len(indices),
        device=device,
        on_step=keep,
    )
    return CalibrationSet.concatenate(kept)
