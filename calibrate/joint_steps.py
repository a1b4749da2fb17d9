"""Steps of many trajectories at once, at different steps and guidance scales: the same bits.

A trajectory's own step is a few dozen operations on one small image; where a batch mixes requests
they take longer than a GPU's denoiser call. Everything is elementwise, so that a stack of images
with coefficients of their own gives the bits that each gives alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .sampling import Trajectory


class JointStep:
    """One step of all `trajectories`: `rows` is what to predict for, `advance` takes it.

    The rows with labels come first, those of guided trajectories before the others; then the rows
    without labels. So each operation works on one slice of the call, and nothing is gathered.
    """

    def __init__(self, trajectories: Sequence[Trajectory]) -> None:
        guided = [trajectory for trajectory in trajectories if trajectory.halves == 2]
        plain = [trajectory for trajectory in trajectories if trajectory.halves == 1]
        self._guided = guided
        self._trajectories = guided + plain
        self._counts = [trajectory.sample_count for trajectory in self._trajectories]
        self._count = sum(self._counts)
        self._guided_count = sum(self._counts[: len(guided)])
        self._seen: Tensor | None = None  # the inputs of `rows` with labels

    @torch.no_grad()
    def rows(self, padded_to: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """x [R, C, H, W], timesteps and labels [R]; for one trajectory what its `rows` gives.

        Up to `padded_to` rows are repeats of the first: real values, so that nothing overflows.
        """
        inputs = [trajectory.scaled_input() for trajectory in self._trajectories]
        timesteps: list[int] = []
        labels: list[int] = []
        for trajectory in self._trajectories:
            timesteps += [trajectory.timestep] * trajectory.sample_count
            labels += trajectory.labels
        timesteps += timesteps[: self._guided_count]
        for trajectory in self._guided:
            labels += [trajectory.null_label] * trajectory.sample_count
        padding = max(padded_to - len(labels), 0)
        timesteps += timesteps[:1] * padding
        labels += labels[:1] * padding
        x = torch.cat(inputs + inputs[: len(self._guided)] + [inputs[0][:1]] * padding)
        self._seen = x[: self._count]
        return (
            x,
            torch.tensor(timesteps, device=x.device),
            torch.tensor(labels, device=x.device),
        )

    @torch.no_grad()
    def advance(self, prediction: Tensor) -> dict[Trajectory, Exception]:
        """Take the step by the noise predicted for `rows`, with or without the padding's.

        Returns what each one's own scheduler raised: such a trajectory has not moved.
        """
        if self._seen is None:
            raise RuntimeError("a joint step must tell its rows before it advances")
        epsilon = self._guided_noise(prediction)
        joint = [trajectory.of_scheduler(steps_jointly) for trajectory in self._trajectories]
        if all(joint):
            _ddim_steps(self._trajectories, self._seen, epsilon)
            return {}
        errors: dict[Trajectory, Exception] = {}
        epsilons, seen = epsilon.split(self._counts), self._seen.split(self._counts)
        for trajectory, own, is_joint in zip(self._trajectories, epsilons, joint, strict=True):
            if is_joint:
                continue
            try:
                trajectory.step_by(own)
            except Exception as error:  # a scheduler's own; its neighbours are sound
                errors[trajectory] = error
        if any(joint):
            places = [place for place, is_joint in enumerate(joint) if is_joint]
            _ddim_steps(
                [self._trajectories[place] for place in places],
                torch.cat([seen[place] for place in places]),
                torch.cat([epsilons[place] for place in places]),
            )
        return errors

    def _guided_noise(self, prediction: Tensor) -> Tensor:
        """[n, C, H, W], as `Trajectory.advance` makes it of each one's own rows."""
        prediction = prediction.to(self._trajectories[0].x)
        if not self._guided:
            return prediction[: self._count]
        scales = [t.guidance for t in self._guided for _ in range(t.sample_count)]
        scale = torch.tensor(scales, dtype=prediction.dtype, device=prediction.device)
        null = prediction[self._count : self._count + self._guided_count]
        epsilon = prediction[: self._count].clone()  # what the engine gave stays its own
        epsilon[: self._guided_count].sub_(null).mul_(scale.view(-1, 1, 1, 1)).add_(null)
        return epsilon


def steps_jointly(scheduler: Any) -> bool:
    """Whether `_ddim_steps` knows this scheduler's step: diffusers' DDIM on predicted noise, not
    thresholded. (Sampling never sets its eta, so the step adds no noise.)"""
    return (
        type(scheduler).__name__ == "DDIMScheduler"
        and scheduler.config.prediction_type == "epsilon"
        and not scheduler.config.thresholding
    )


def _ddim_steps(trajectories: Sequence[Trajectory], x: Tensor, epsilon: Tensor) -> None:
    """Equation 12 of Song et al., arXiv 2010.02502, without added noise, in the order in which
    diffusers computes it; x [n, C, H, W] is all of theirs, which DDIM does not scale."""
    counts = [trajectory.sample_count for trajectory in trajectories]
    coefficients = [
        row
        for trajectory in trajectories
        for row in [trajectory.of_scheduler(ddim_coefficients)[trajectory.position]]
        * trajectory.sample_count
    ]
    columns = torch.tensor(coefficients, dtype=x.dtype, device=x.device).view(-1, 5, 1, 1, 1)
    noise, signal, next_signal, next_noise, bound = columns.unbind(1)
    # in place on what is fresh: the same values, and no memory to be asked for
    foreseen = noise * epsilon
    torch.sub(x, foreseen, out=foreseen).div_(signal).clamp_(-bound, bound)
    stepped = foreseen.mul_(next_signal).add_(next_noise * epsilon)
    start = 0
    for trajectory, own, count in zip(trajectories, stepped.split(counts), counts, strict=True):
        trajectory.take(own, x, epsilon, start)
        start += count


def ddim_coefficients(scheduler: Any) -> list[list[float]]:
    """Of each step, as float32: √(1−ᾱ) and √ᾱ, √ᾱ and √(1−ᾱ) of where it leads, and the bound of
    the foreseen sample (infinite where it is not clipped)."""
    config, timesteps = scheduler.config, scheduler.timesteps.cpu()
    previous = timesteps - config.num_train_timesteps // scheduler.num_inference_steps
    alphas, last = scheduler.alphas_cumprod, scheduler.final_alpha_cumprod
    here = alphas[timesteps]
    there = torch.where(previous >= 0, alphas[previous.clamp(min=0)], last)
    bound = config.clip_sample_range if config.clip_sample else torch.inf
    roots = torch.stack([1 - here, here, there, 1 - there]).sqrt()
    found: list[list[float]] = torch.cat([roots, torch.full_like(here, bound)[None]]).T.tolist()
    return found
