"""How much an error of the predicted noise at one timestep is worth in the finished image.

An error at an early step is partly undone by the steps after it; one at the last step stays. So
before a search adds up errors of the denoiser's output over timesteps, each is weighted with

    gain(t) = ‖x₀(ε + δ at t only) − x₀(ε)‖² / ‖δ‖²,

measured on the model's own trajectories: δ is the error that a quantized denoiser makes at step t,
so its direction is a real one, and every other step runs in full precision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...progress import Progress, Silent
from ..families.base import Denoiser
from ..model import DiffusionModel
from ..sampling import SamplingSettings, sample_images

_SILENT = Silent()
IMAGES = 8
STEPS = 6


@dataclass(frozen=True)
class SamplerGains:
    """Squared gains by timestep, for the steps at which they were measured."""

    timesteps: tuple[int, ...]  # falling
    gains: tuple[float, ...]

    def at(self, timestep: Tensor) -> Tensor:
        """Gain of each timestep int64 [S] as float64 [S]: log-linear between measured steps."""
        known = np.array(self.timesteps[::-1], dtype=np.float64)
        logs = np.log(np.maximum(self.gains[::-1], 1e-30))
        found = np.exp(np.interp(timestep.cpu().numpy().astype(np.float64), known, logs))
        return torch.from_numpy(found)


def measure_gains(
    model: DiffusionModel,
    full: Denoiser,
    quantized: Denoiser,
    settings: SamplingSettings,
    *,
    images: int = IMAGES,
    steps: int = STEPS,
    device: torch.device | str = "cpu",
    progress: Progress = _SILENT,
) -> SamplerGains:
    """Measure at `steps` of the sampler's steps, spread evenly, the first and the last among them.

    Each takes one trajectory of `images` images under `settings`, guidance included; δ and the
    gain are those of the conditional noise, which is what calibration samples hold.
    """
    switch = _Perturbed(full, quantized)

    def run() -> Tensor:
        return sample_images(
            model, switch, settings, range(images), batch_size=images, device=device
        ).double()

    clean = run()
    count = switch.calls
    chosen = sorted({round(step) for step in np.linspace(0, count - 1, min(steps, count))})
    timesteps, gains = [], []
    for step in progress.track(chosen, "gains of the sampler's steps", len(chosen)):
        switch.start(step)
        error = (run() - clean).square().sum().item()
        timesteps.append(switch.timestep)
        gains.append(error / max(switch.squared_error(images), 1e-30))
    return SamplerGains(tuple(timesteps), tuple(gains))


class _Perturbed:
    """A denoiser that answers with the quantized one's noise at one step and else with the full."""

    def __init__(self, full: Denoiser, quantized: Denoiser) -> None:
        self._full = full
        self._quantized = quantized
        self._step: int | None = None
        self._difference: Tensor | None = None
        self.calls = 0
        self.timestep = 0

    def start(self, step: int) -> None:
        self._step, self.calls, self._difference = step, 0, None

    def squared_error(self, images: int) -> float:
        """‖δ‖² over the conditional part of the batch."""
        if self._difference is None:
            raise ValueError("the perturbed step has not run")
        return self._difference[:images].double().square().sum().item()

    def __call__(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        step, self.calls = self.calls, self.calls + 1
        if step != self._step:
            return self._full(x, timestep, label)
        noise = self._quantized(x, timestep, label)
        self._difference = noise - self._full(x, timestep, label)
        self.timestep = int(timestep[0])
        return noise


def weights_of(gains: SamplerGains, timesteps: Tensor, steps: Sequence[int]) -> Tensor:
    """Weight of each calibration sample, float64 [S]: their sum over samples of mean squared
    errors estimates the image's mean squared error after a sampler of `steps` timesteps."""
    return gains.at(timesteps) * (len(steps) / len(timesteps))


def as_json(gains: SamplerGains) -> Mapping[str, list[float]]:
    """For reports."""
    return {"timesteps": [float(t) for t in gains.timesteps], "gains": list(gains.gains)}
