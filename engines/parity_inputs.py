"""The inputs on which denoisers are compared: what full precision meets on its own trajectories."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..calibrate.families.base import Denoiser
from ..calibrate.model import DiffusionModel
from ..calibrate.sampling import SamplingSettings, initial_noise, labels_for, sample_images
from ..progress import Progress

# Noise that no recorded trajectory starts from.
_NOISE_FROM = 1 << 32
_NOISE_BATCH = 64


@dataclass(frozen=True)
class Step:
    """One step of `n` trajectories: x [n, C, H, W] float32 and labels int64 [n], on the CPU."""

    position: int
    timestep: int
    x: Tensor
    labels: Tensor

    @property
    def timesteps(self) -> Tensor:
        """The timestep once for each image: int64 [n]."""
        return torch.full_like(self.labels, self.timestep)

    def arrays(self, names: tuple[str, ...]) -> dict[str, NDArray[np.generic]]:
        """The denoiser's exported inputs under their `names`, in the family's order."""
        tensors = (self.x, self.timesteps, self.labels)
        return {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}

    def run(self, denoiser: Denoiser, device: torch.device | str = "cpu") -> Tensor:
        """The predicted noise [n, C, H, W], on the CPU."""
        inputs = (self.x.to(device), self.timesteps.to(device), self.labels.to(device))
        return denoiser(*inputs).detach().cpu()


def record_trajectories(
    model: DiffusionModel,
    settings: SamplingSettings,
    images: int,
    *,
    progress: Progress | None = None,
) -> list[Step]:
    """Sample the first `images` images with full precision; the conditional input of every step."""
    steps: list[Step] = []

    def keep(position: int, timestep: int, x: Tensor, labels: Tensor) -> None:
        steps.append(Step(position, timestep, x.detach().cpu().float().clone(), labels.cpu()))

    sample_images(
        model,
        model.as_denoiser(),
        settings,
        range(images),
        batch_size=images,
        device=model.device,
        progress=progress,
        on_step=keep,
    )
    return steps


def spread(length: int, count: int) -> list[int]:
    """At most `count` positions in 0 … length − 1, both ends among them, evenly spaced."""
    positions = np.linspace(0, length - 1, min(count, length)).round().astype(int)
    return sorted(set(positions.tolist()))


def noise_steps(model: DiffusionModel, timestep: int, images: int) -> list[Step]:
    """More first steps: `images` fresh noise images at `timestep`, in steps of at most 64."""
    made = []
    for start in range(0, images, _NOISE_BATCH):
        indices = range(_NOISE_FROM + start, _NOISE_FROM + min(start + _NOISE_BATCH, images))
        x = initial_noise(indices, model.sample_shape, seed=0)
        labels = labels_for(indices, model.family.class_count(model.denoiser))
        made.append(Step(-1, timestep, x, labels))
    return made
