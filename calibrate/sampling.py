"""Sampling: from noise to latents or pixels, with any denoiser and a diffusers scheduler."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..progress import Progress, Silent
from .families.base import Denoiser
from .model import DiffusionModel
from .schedulers import make_scheduler, set_steps

# (position of the step, its timestep, the denoiser's conditional input [n, C, H, W], labels [n])
OnStep = Callable[[int, int, Tensor, Tensor], None]

_NOISE_OF_STEPS = 1  # stream of a sample's later noise, beside stream 0 of its initial noise


@dataclass(frozen=True)
class SamplingSettings:
    """How images are drawn. `guidance_scale` 1.0 is the plain conditional model.

    `scheduler` is a diffusers class name; None takes the model's own.
    """

    num_inference_steps: int
    guidance_scale: float
    seed: int
    scheduler: str | None = None

    def __post_init__(self) -> None:
        steps, scale, seed = self.num_inference_steps, self.guidance_scale, self.seed
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= 1000:
            raise InputError(f"inference steps must be between 1 and 1000, got {steps!r}")
        if not (math.isfinite(scale) and scale >= 0):
            raise InputError(f"the guidance scale must be finite and not negative, got {scale!r}")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
            raise InputError(f"the seed must be between 0 and 2^64-1, got {seed!r}")


def initial_noise(indices: Sequence[int], shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal noise [n, *shape], float32 on the CPU.

    Sample i's noise depends on (seed, i) alone: a counter-based generator (Philox) is keyed with
    the pair, so that batches, devices and the number of samples do not matter, and no two samples
    can share a stream as hashed 32-bit seeds would.
    """
    noise = np.empty((len(indices), *shape), dtype=np.float32)
    for row, index in zip(noise, indices, strict=True):
        random = np.random.Generator(np.random.Philox(key=[seed, index]))
        random.standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(noise)


def labels_for(indices: Sequence[int], class_count: int) -> Tensor:
    """Class labels 0 … class_count-1 in turn, by sample index: int64 [n]."""
    return torch.tensor([index % class_count for index in indices], dtype=torch.int64)


def sample_images(
    model: DiffusionModel,
    denoiser: Denoiser,
    settings: SamplingSettings,
    indices: Sequence[int],
    *,
    batch_size: int,
    device: torch.device | str,
    progress: Progress | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Run the reverse process for samples `indices`: latents or pixels [n, C, H, W], float32, CPU.

    `denoiser` is called on `device`, once a step: with guidance on conditional and null labels in
    one batch of 2n (conditional half first), at guidance 1.0 on n. Guidance (Ho & Salimans,
    arXiv 2207.12598) is eps = eps_null + scale · (eps_label − eps_null), on the noise channels.
    The scheduler runs in float32. `on_step` sees the conditional input before each call.
    """
    if batch_size < 1:
        raise InputError(f"the batch size must be at least 1, got {batch_size}")
    steps = len(set_steps(_scheduler(model, settings), settings.num_inference_steps))
    batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    finished: list[Tensor] = []

    def run() -> Iterator[None]:
        for batch in batches:
            trajectory = _Trajectory(model, denoiser, settings, batch, torch.device(device))
            for position in range(steps):
                trajectory.step(position, on_step)
                yield
            finished.append(trajectory.x.cpu())

    for _ in (progress or Silent()).track(run(), "sampling", total=len(batches) * steps):
        pass
    return torch.cat(finished) if finished else torch.empty((0, *model.sample_shape))


class _Trajectory:
    """One batch on its way from noise to sample, with a scheduler of its own: they keep state."""

    def __init__(
        self,
        model: DiffusionModel,
        denoiser: Denoiser,
        settings: SamplingSettings,
        indices: Sequence[int],
        device: torch.device,
    ) -> None:
        self.denoiser = denoiser
        self.guidance = settings.guidance_scale
        self.scheduler = _scheduler(model, settings)
        self.timesteps = set_steps(self.scheduler, settings.num_inference_steps)
        self.options = _step_options(self.scheduler, indices, settings.seed)
        family = model.family
        self.labels = labels_for(indices, family.class_count(model.denoiser)).to(device)
        self.null_labels = torch.full_like(self.labels, family.null_label(model.denoiser))
        noise = initial_noise(indices, model.sample_shape, settings.seed).to(device)
        self.x: Tensor = noise * float(self.scheduler.init_noise_sigma)

    @torch.no_grad()
    def step(self, position: int, on_step: OnStep | None) -> None:
        """Predict the noise at this step's timestep and let the scheduler move `x`."""
        timestep = self.timesteps[position]
        # the scheduler's own tensor: its steps look themselves up by it
        own_timestep = self.scheduler.timesteps[position]
        x = self.scheduler.scale_model_input(self.x, own_timestep)
        if on_step is not None:
            on_step(position, timestep, x, self.labels)
        epsilon = self._predict(x, timestep)
        step = self.scheduler.step(epsilon, own_timestep, self.x, **self.options)
        self.x = step.prev_sample

    def _predict(self, x: Tensor, timestep: int) -> Tensor:
        count = len(x)
        if self.guidance == 1.0:
            timesteps = torch.full_like(self.labels, timestep)
            return self.denoiser(x, timesteps, self.labels).to(x)
        labels = torch.cat([self.labels, self.null_labels])
        timesteps = torch.full_like(labels, timestep)
        both = self.denoiser(torch.cat([x, x]), timesteps, labels).to(x)
        with_label, without = both[:count], both[count:]
        return without + self.guidance * (with_label - without)


def _scheduler(model: DiffusionModel, settings: SamplingSettings) -> Any:
    return make_scheduler(model.scheduler_config, settings.scheduler)


def _step_options(scheduler: Any, indices: Sequence[int], seed: int) -> dict[str, Any]:
    """Generators for schedulers that add noise in their steps: one a sample, so batches agree."""
    if "generator" not in inspect.signature(scheduler.step).parameters:
        return {}
    seeds = [
        np.random.SeedSequence([seed, index, _NOISE_OF_STEPS]).generate_state(1, np.uint64)
        for index in indices
    ]
    return {"generator": [torch.Generator().manual_seed(int(value[0])) for value in seeds]}


@torch.no_grad()
def decode_images(
    model: DiffusionModel,
    samples: Tensor,
    batch_size: int,
    *,
    progress: Progress | None = None,
) -> Tensor:
    """Images float32 [n, 3, H, W] in [-1, 1] on the CPU, from what `sample_images` returned.

    Latents go through the model's VAE, in batches; pixels are clamped. Raises `InputError` for
    latents without a VAE.
    """
    if model.vae is None:
        if samples.shape[1] != 3:
            raise InputError(
                f"samples of {samples.shape[1]} channels are latents and need a VAE to become "
                f"images; put an AutoencoderKL as vae/ beside the model {model.name}"
            )
        return samples.float().cpu().clamp(-1, 1)
    if batch_size < 1:
        raise InputError(f"the batch size must be at least 1, got {batch_size}")
    vae: Any = model.vae
    batches = samples.split(batch_size)
    images = []
    for batch in (progress or Silent()).track(batches, "decoding", total=len(batches)):
        # times the reciprocal, as diffusers' pipeline does: the same bits
        latents = batch.to(device=vae.device, dtype=vae.dtype) * (1 / vae.config.scaling_factor)
        images.append(vae.decode(latents).sample.float().cpu().clamp(-1, 1))
    return torch.cat(images)
