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


def rows_together(trajectories: Sequence[Trajectory]) -> tuple[Tensor, Tensor, Tensor]:
    """What `Trajectory.rows` gives for each, in a row: x [R, C, H, W], timesteps and labels [R]."""
    places: list[int] = []
    timesteps: list[int] = []
    labels: list[int] = []
    start = 0
    for trajectory in trajectories:
        end = start + trajectory.sample_count
        places += [*range(start, end)] * trajectory.halves
        timesteps += [trajectory.timestep] * trajectory.row_count
        labels += trajectory.label_rows
        start = end
    x = torch.cat([trajectory.scaled_input() for trajectory in trajectories])
    if len(places) > start:  # the rows of guided samples, twice
        x = x[places]
    return (
        x,
        torch.tensor(timesteps, device=x.device),
        torch.tensor(labels, device=x.device),
    )


@torch.no_grad()
def advance_together(
    trajectories: Sequence[Trajectory], prediction: Tensor
) -> list[Exception | None]:
    """Take one step of each by the noise predicted for `rows_together` [R, C, H, W].

    Returns what each one's own scheduler raised: such a trajectory has not moved.
    """
    epsilons = _guided(trajectories, prediction)
    joint = [steps_jointly(trajectory.scheduler) for trajectory in trajectories]
    errors: list[Exception | None] = [None] * len(trajectories)
    for place, (trajectory, epsilon) in enumerate(zip(trajectories, epsilons, strict=True)):
        if joint[place]:
            continue
        try:
            trajectory.step_by(epsilon)
        except Exception as error:  # a scheduler's own; its neighbours are sound
            errors[place] = error
    together = [place for place, is_joint in enumerate(joint) if is_joint]
    if together:
        _ddim_steps([trajectories[i] for i in together], [epsilons[i] for i in together])
    return errors


def steps_jointly(scheduler: Any) -> bool:
    """Whether `_ddim_steps` knows this scheduler's step: diffusers' DDIM on predicted noise, not
    thresholded. (Sampling never sets its eta, so the step adds no noise.)"""
    return (
        type(scheduler).__name__ == "DDIMScheduler"
        and scheduler.config.prediction_type == "epsilon"
        and not scheduler.config.thresholding
    )


def _guided(trajectories: Sequence[Trajectory], prediction: Tensor) -> list[Tensor]:
    """Each one's noise [n, C, H, W], as `Trajectory.advance` makes it of its own rows."""
    prediction = prediction.to(trajectories[0].x)
    with_label: list[int] = []
    without: list[int] = []
    scales: list[float] = []
    start = 0
    for trajectory in trajectories:
        middle = start + trajectory.sample_count
        with_label += range(start, middle)
        if trajectory.halves == 2:
            without += range(middle, start + trajectory.row_count)
            scales += [trajectory.guidance] * trajectory.sample_count
        start += trajectory.row_count
    counts = [trajectory.sample_count for trajectory in trajectories]
    if not without:
        return list(prediction.split(counts))
    epsilon = prediction[with_label]
    is_guided = torch.tensor([t.halves == 2 for t in trajectories for _ in range(t.sample_count)])
    scale = torch.tensor(scales, dtype=epsilon.dtype, device=epsilon.device).view(-1, 1, 1, 1)
    null, guided = prediction[without], epsilon[is_guided]
    epsilon[is_guided] = null + scale * (guided - null)
    return list(epsilon.split(counts))


def _ddim_steps(trajectories: Sequence[Trajectory], epsilons: Sequence[Tensor]) -> None:
    """Equation 12 of Song et al., arXiv 2010.02502, without added noise, in the order in which
    diffusers computes it."""
    counts = [trajectory.sample_count for trajectory in trajectories]
    x, epsilon = torch.cat([t.x for t in trajectories]), torch.cat(list(epsilons))
    seen = torch.cat([t.scaled_input() for t in trajectories])
    coefficients = [
        t.coefficients(ddim_coefficients)[t.position].expand(count, -1)
        for t, count in zip(trajectories, counts, strict=True)
    ]
    columns = torch.cat(coefficients).to(x).view(-1, 5, 1, 1, 1).unbind(1)
    noise, signal, next_signal, next_noise, bound = columns
    foreseen = ((x - noise * epsilon) / signal).clamp(-bound, bound)
    stepped = next_signal * foreseen + next_noise * epsilon
    parts = (values.split(counts) for values in (stepped, seen, epsilon))
    for trajectory, *own in zip(trajectories, *parts, strict=True):
        trajectory.take(*own)


def ddim_coefficients(scheduler: Any) -> Tensor:
    """[steps, 5], float32: √(1−ᾱ) and √ᾱ of each step, √ᾱ and √(1−ᾱ) of where it leads, and the
    bound of the foreseen sample (infinite where it is not clipped)."""
    config, timesteps = scheduler.config, scheduler.timesteps.cpu()
    previous = timesteps - config.num_train_timesteps // scheduler.num_inference_steps
    alphas, last = scheduler.alphas_cumprod, scheduler.final_alpha_cumprod
    here = alphas[timesteps]
    there = torch.where(previous >= 0, alphas[previous.clamp(min=0)], last)
    bound = config.clip_sample_range if config.clip_sample else torch.inf
    roots = torch.stack([1 - here, here, there, 1 - there]).sqrt()
    return torch.cat([roots, torch.full_like(here, bound).unsqueeze(0)]).T.contiguous()
