"""Errors of the denoiser's output at each timestep, and the bound between engine and simulation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibrate.families.base import Denoiser
from ..progress import Progress, Silent
from .parity_inputs import Step
from .parity_measure import Comparer, Comparison, compare

# The engine may be this many times as far from the simulation as the simulation is from its own
# computation in a wider dtype (docs/report.md derives it).
BOUND_FACTOR = 2.0


@dataclass(frozen=True)
class TimestepError:
    """Relative errors of the predicted noise [n, C, H, W] at one step, the same x_t fed to all."""

    position: int
    timestep: int
    simulation: Comparison
    engine: Comparison | None = None


@dataclass(frozen=True)
class DenoiserBound:
    """‖engine − simulation‖ beside ‖simulation − wider simulation‖ over the same inputs.

    `reference_dtype` is the dtype of the simulation that both are measured by, `own_dtypes` the
    two dtypes whose distance is the simulation's own: float32 and float64 for a float32 file,
    float16 and float32 for a float16 one.
    """

    engine: Comparison
    own: Comparison
    own_dtypes: tuple[str, str]
    inputs: int

    @property
    def ratio(self) -> float:
        """Engine distance in units of the own one; at most `BOUND_FACTOR` to pass."""
        if self.engine.distance == 0:
            return 0.0
        return self.engine.distance / self.own.distance if self.own.distance > 0 else math.inf


def run_steps(
    denoiser: Denoiser,
    steps: Sequence[Step],
    description: str,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> list[Tensor]:
    """The predicted noise at each step, each [n, C, H, W] on the CPU."""
    tracked = (progress or Silent()).track(steps, description, total=len(steps))
    return [step.run(denoiser, device) for step in tracked]


def compare_outputs(got: Sequence[Tensor], expected: Sequence[Tensor]) -> Comparison:
    """One comparison over all steps; the worst coordinate's first number is the step."""
    comparer = Comparer()
    for one, other in zip(got, expected, strict=True):
        comparer.add(one, other)
    return comparer.result()


def timestep_errors(
    steps: Sequence[Step],
    full: Sequence[Tensor],
    simulation: Sequence[Tensor],
    engine: Sequence[Tensor] | None,
) -> list[TimestepError]:
    """Simulation against full precision and engine against simulation, step by step."""
    return [
        TimestepError(
            step.position,
            step.timestep,
            compare(simulation[index], full[index]),
            None if engine is None else compare(engine[index], simulation[index]),
        )
        for index, step in enumerate(steps)
    ]


def denoiser_bound(
    engine: Sequence[Tensor],
    simulation: Sequence[Tensor],
    other: Sequence[Tensor],
    dtype: str,
) -> DenoiserBound:
    """The bound for a file that computes in `dtype`.

    `simulation` is float32. `other` is the simulation in float64 for a float32 file, and in float16
    for a float16 file; all over the same inputs.
    """
    dtypes = ("float32", "float64") if dtype == "float32" else (dtype, "float32")
    return DenoiserBound(
        compare_outputs(engine, simulation),
        compare_outputs(simulation, other),
        dtypes,
        sum(len(output) for output in engine),
    )
