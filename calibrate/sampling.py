"""Sampling: from noise to latents or pixels, with any denoiser and a diffusers scheduler."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..progress import Progress, Silent
from .families.base import Denoiser, Family
from .model import DiffusionModel
from .schedulers import make_scheduler, prepare_scheduler, set_steps

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
    facts = SampledModel.of(model)
    scheduler = make_scheduler(model.scheduler_config, settings.scheduler)
    steps = len(set_steps(scheduler, settings.num_inference_steps))
    batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    finished: list[Tensor] = []

    def run() -> Iterator[None]:
        for batch in batches:
            trajectory = Trajectory(facts, settings, batch, device)
            while trajectory.steps_left:
                _take_step(trajectory, denoiser, on_step)
                yield
            finished.append(trajectory.x.cpu())

    for _ in (progress or Silent()).track(run(), "sampling", total=len(batches) * steps):
        pass
    return torch.cat(finished) if finished else torch.empty((0, *model.sample_shape))


@dataclass(frozen=True)
class SampledModel:
    """What sampling needs to know of a model: no weights.

    `sample_shape` is [C, H, W] of one noise sample.
    """

    sample_shape: tuple[int, ...]
    class_count: int
    null_label: int
    scheduler_config: dict[str, Any]

    @classmethod
    def of(cls, model: DiffusionModel) -> SampledModel:
        """The facts of a loaded model."""
        return cls.of_outline(model.family, model.denoiser, model.scheduler_config)

    @classmethod
    def of_outline(
        cls, family: Family, outline: nn.Module, scheduler_config: dict[str, Any]
    ) -> SampledModel:
        """The facts of a denoiser that may lie on the meta device."""
        return cls(
            family.inputs(outline)[0].shape,
            family.class_count(outline),
            family.null_label(outline),
            scheduler_config,
        )


# A step's inputs and predictions [≥ start + n, C, H, W], where a trajectory's start, its timestep.
_Seen = tuple[Tensor, Tensor, int, int]


class Trajectory:
    """Samples on their way from noise to image, with a scheduler of their own: they keep state.

    The caller runs the denoiser: `rows` is what it must predict for next, `advance` takes the
    prediction. So one engine call may serve trajectories at different steps.
    """

    def __init__(
        self,
        model: SampledModel,
        settings: SamplingSettings,
        indices: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> None:
        self.guidance = settings.guidance_scale
        self._prepared = prepare_scheduler(
            model.scheduler_config, settings.scheduler, settings.num_inference_steps
        )
        self.scheduler = self._prepared.scheduler
        self.timesteps = self._prepared.timesteps
        self.position = 0  # of the step that `rows` asks for
        self.sample_count = len(indices)
        # how often each sample is in `rows`: with its label, and under guidance without
        self.halves = 1 if self.guidance == 1.0 else 2
        self.row_count = self.halves * self.sample_count
        self.labels: list[int] = labels_for(indices, model.class_count).tolist()
        self.null_label = model.null_label
        noise = initial_noise(indices, model.sample_shape, settings.seed).to(device)
        self.x: Tensor = noise * float(self.scheduler.init_noise_sigma)
        self._input: Tensor | None = None  # of this step, once it was asked for
        self._last: _Seen | None = None
        self._indices, self._seed = tuple(indices), settings.seed

    @property
    def steps_left(self) -> int:
        return len(self.timesteps) - self.position

    @property
    def timestep(self) -> int:
        """Of the step that `rows` asks for."""
        return self.timesteps[self.position]

    @cached_property
    def _options(self) -> dict[str, Any]:
        """Made where a step asks for them: seeding generators takes longer than a joint step."""
        return _step_options(self.scheduler, self._indices, self._seed)

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """The denoiser's inputs: x [row_count, C, H, W], timesteps and labels [row_count].

        Under guidance the conditional half comes first.
        """
        x = torch.cat([self.scaled_input()] * self.halves)
        null_labels = [self.null_label] * (self.row_count - self.sample_count)
        labels = torch.tensor(self.labels + null_labels, device=x.device)
        return x, torch.full_like(labels, self.timestep), labels

    @torch.no_grad()
    def advance(self, prediction: Tensor) -> None:
        """Take one step by the noise predicted for `rows` [row_count, C, H, W]."""
        epsilon = prediction.to(self.x)
        if self.guidance != 1.0:
            with_label, without = epsilon.chunk(2)
            epsilon = without + self.guidance * (with_label - without)
        self.step_by(epsilon)

    def step_by(self, epsilon: Tensor) -> None:
        """Take one step by noise [n, C, H, W] that guidance has gone into. Raises what the
        scheduler raises, and has not moved then."""
        seen = self.scaled_input()
        # the scheduler's own tensor: its steps look themselves up by it
        own_timestep = self.scheduler.timesteps[self.position]
        step = self.scheduler.step(epsilon, own_timestep, self.x, **self._options)
        self.take(step.prev_sample, seen, epsilon)

    def take(self, x: Tensor, seen: Tensor, epsilon: Tensor, start: int = 0) -> None:
        """Move on to `x` [n, C, H, W], which a step made of the input `seen` and its noise: both
        [≥ start + n, C, H, W], with this trajectory's from `start` on."""
        self._last = seen, epsilon, start, self.timesteps[self.position]
        self.x, self._input = x, None
        self.position += 1

    def of_scheduler(self, of: Callable[[Any], Any]) -> Any:
        """What `of` makes of the scheduler: once for all trajectories that share it."""
        return self._prepared.derived(of)

    def scaled_input(self) -> Tensor:
        """x [n, C, H, W] as this scheduler's denoiser wants to see it."""
        if self._prepared.is_plain:
            return self.x
        if self._input is None:
            own_timestep = self.scheduler.timesteps[self.position]
            self._input = self.scheduler.scale_model_input(self.x, own_timestep)
        return self._input

    @torch.no_grad()
    def foreseen(self) -> Tensor:
        """The finished samples as the last step foresaw them, [n, C, H, W]; before it the noise.

        (x − √(1−ᾱ) ε) / √ᾱ: 'predicted x0' of Song et al., arXiv 2010.02502, equation 12. It is
        the same for every scheduler, since the scaled input is always the variance-preserving one.
        """
        if self._last is None:
            return self.x
        seen, epsilon, start, timestep = self._last
        x, prediction = (values[start : start + self.sample_count] for values in (seen, epsilon))
        alpha = self.scheduler.alphas_cumprod[timestep].to(x)
        signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
        kind = self.scheduler.config.prediction_type
        if kind == "sample":
            return prediction
        if kind == "v_prediction":
            return signal * x - noise * prediction
        return (x - noise * prediction) / signal


@torch.no_grad()
def _take_step(trajectory: Trajectory, denoiser: Denoiser, on_step: OnStep | None) -> None:
    x, timesteps, labels = trajectory.rows()
    if on_step is not None:
        count = len(trajectory.x)
        on_step(trajectory.position, int(timesteps[0]), x[:count], labels[:count])
    trajectory.advance(denoiser(x, timesteps, labels))


@cache
def _takes_generator(step: Callable[..., Any]) -> bool:
    return "generator" in inspect.signature(step).parameters


def _step_options(scheduler: Any, indices: Sequence[int], seed: int) -> dict[str, Any]:
    """Generators for schedulers that add noise in their steps: one a sample, so batches agree."""
    if not _takes_generator(type(scheduler).step):
        return {}
    seeds = [
        np.random.SeedSequence([seed, index, _NOISE_OF_STEPS]).generate_state(1, np.uint64)
        for index in indices
    ]
    return {"generator": [torch.Generator().manual_seed(int(value[0])) for value in seeds]}


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
    if model.vae is None and samples.shape[1] != 3:
        raise InputError(
            f"samples of {samples.shape[1]} channels are latents and need a VAE to become "
            f"images; put an AutoencoderKL as vae/ beside the model {model.name}"
        )
    return decode_samples(model.vae, samples, batch_size, progress=progress)


@torch.no_grad()
def decode_samples(
    vae: nn.Module | None,
    samples: Tensor,
    batch_size: int,
    *,
    progress: Progress | None = None,
) -> Tensor:
    """As `decode_images`; without a VAE `samples` [n, 3, H, W] are pixels."""
    if vae is None:
        return samples.float().cpu().clamp(-1, 1)
    if batch_size < 1:
        raise InputError(f"the batch size must be at least 1, got {batch_size}")
    decoder: Any = vae
    batches = samples.split(batch_size)
    images = []
    for batch in (progress or Silent()).track(batches, "decoding", total=len(batches)):
        # times the reciprocal, as diffusers' pipeline does: the same bits
        scale = 1 / decoder.config.scaling_factor
        latents = batch.to(device=decoder.device, dtype=decoder.dtype) * scale
        images.append(decoder.decode(latents).sample.float().cpu().clamp(-1, 1))
    return torch.cat(images)
