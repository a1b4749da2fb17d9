"""The gate: whether the paired figures and the FID say that the quantized model may be deployed.

A pure function of figures. Checks, in order (docs/report.md has the derivations):

1. `finite_images`: no image of either model holds NaN or infinity;
2. `linears_same_input`: every quantized linear, fed the same input, is as close to the simulation
   as its bound says; for an engine that shows no linears `engine_vs_file` instead: its outputs are
   as close to those of its own file in ONNX Runtime;
3. `denoiser_bound`: the engine is at most twice as far from the simulation as the simulation is
   from itself in another precision; left out for an engine that changes the plan's meaning;
4. `simulation_error`: the quantized denoiser is nearer to full precision than an all-zero output;
5. `fid_increase`: the lower end of the FID difference's 95 % interval is within the limit.

A check that could not be made is reported as not run, with the reason, and never as passed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ..calibrate.fid import FidDifference
from .parity import DenoiserParity, FileParity
from .parity_images import ImageParity
from .parity_internals import LinearError
from .parity_timesteps import BOUND_FACTOR

Outcome = Literal["passed", "failed", "not run"]

DEFAULT_FID_SHARE = 0.2
LINEAR_BOUND = 1e-6
FILE_BOUND = 2e-2
SIMULATION_BOUND = 1.0


@dataclass(frozen=True)
class Limits:
    """What the gate allows.

    max_fid_increase: absolute; None takes 20 % of the full-precision FID.
    """

    max_fid_increase: float | None = None

    def fid_increase(self, full_precision: float) -> float:
        if self.max_fid_increase is not None:
            return self.max_fid_increase
        return DEFAULT_FID_SHARE * full_precision


@dataclass(frozen=True)
class Check:
    """One question and its answer; value and limit are None where the check was not run."""

    name: str
    outcome: Outcome
    value: float | None
    limit: float | None
    why: str


@dataclass(frozen=True)
class Gate:
    """`passed`: no check failed. `complete`: every check was run."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.outcome != "failed" for check in self.checks)

    @property
    def complete(self) -> bool:
        return all(check.outcome != "not run" for check in self.checks)

    @property
    def reason(self) -> str:
        """One sentence: what failed, else what was not run, else that all held."""
        for outcome in ("failed", "not run"):
            found = [check.why for check in self.checks if check.outcome == outcome]
            if found:
                return "; ".join(found)
        return "every check held"


def judge(
    parity: DenoiserParity,
    images: ImageParity | None,
    fid: FidDifference | None,
    limits: Limits,
    *,
    no_images: str = "no images were made",
    no_fid: str = "no feature network and reference statistics were given",
) -> Gate:
    """Judge the figures; `no_images` and `no_fid` say why one is missing."""
    return Gate(
        (
            _images(images, no_images),
            _linears(parity) if parity.file is None else _file(parity.file),
            *([_denoiser(parity)] if parity.exact else []),
            _simulation(parity),
            _fid(fid, limits, no_fid),
        )
    )


def linear_bound(linear: LinearError) -> float:
    """The relative error that a linear may have: constant in float32, else twice its own."""
    if linear.own_error is None:
        return LINEAR_BOUND
    return max(LINEAR_BOUND, BOUND_FACTOR * linear.own_error)


def _check(name: str, value: float, limit: float, say: Callable[[str], str]) -> Check:
    """A check that holds while value ≤ limit; NaN and infinity never do."""
    holds = math.isfinite(value) and value <= limit
    shown = value if math.isfinite(value) else None
    return Check(
        name,
        "passed" if holds else "failed",
        shown,
        limit,
        say("within" if holds else "above"),
    )


def _images(images: ImageParity | None, missing: str) -> Check:
    name = "finite_images"
    if images is None:
        return Check(name, "not run", None, None, f"images were not compared: {missing}")
    broken = images.not_finite
    why = (
        f"all {images.samples} image pairs are finite"
        if broken == 0
        else f"{broken} of {images.samples} image pairs hold NaN or infinity, "
        f"image {images.worst_image} first"
    )
    return Check(name, "failed" if broken else "passed", float(broken), 0.0, why)


def _linears(parity: DenoiserParity) -> Check:
    name = "linears_same_input"
    if not parity.linears:
        return Check(name, "not run", None, None, "the plan quantizes no linear")
    # the linear that uses most of its own bound
    worst = max(
        parity.linears, key=lambda linear: linear.comparison.relative_error / linear_bound(linear)
    )
    error, limit = worst.comparison.relative_error, linear_bound(worst)

    def say(where: str) -> str:
        return (
            f"{worst.name} is {error:.2g} from its simulation on the same input, "
            f"{where} the bound {limit:.2g}"
        )

    return _check(name, error, limit, say)


def file_bound(file: FileParity) -> float:
    """The relative error that an engine may have against its own file: twice what another right
    way of running it has, and never less than `FILE_BOUND`."""
    return max(FILE_BOUND, BOUND_FACTOR * file.own.relative_error)


def _file(file: FileParity) -> Check:
    error, limit = file.engine.relative_error, file_bound(file)

    def say(where: str) -> str:
        return (
            f"the engine is {error:.2g} from its own file in ONNX Runtime, which is "
            f"{file.own.relative_error:.2g} from itself without optimizations, {where} the bound "
            f"{limit:.2g}"
        )

    return _check("engine_vs_file", error, limit, say)


def _denoiser(parity: DenoiserParity) -> Check:
    bound = parity.bound
    narrow, wide = bound.own_dtypes

    def say(where: str) -> str:
        return (
            f"the engine is {bound.engine.relative_error:.2g} from the simulation, "
            f"{bound.ratio:.2f} times the distance between {narrow} and {wide} "
            f"({bound.own.relative_error:.2g}), {where} the bound {BOUND_FACTOR:g}"
        )

    return _check("denoiser_bound", bound.ratio, BOUND_FACTOR, say)


def _simulation(parity: DenoiserParity) -> Check:
    error = parity.simulation.relative_error

    def say(where: str) -> str:
        return (
            f"the quantized denoiser is {error:.2g} from full precision, "
            f"{where} the bound {SIMULATION_BOUND:g} (an all-zero output)"
        )

    return _check("simulation_error", error, SIMULATION_BOUND, say)


def _fid(fid: FidDifference | None, limits: Limits, missing: str) -> Check:
    name = "fid_increase"
    if fid is None:
        return Check(name, "not run", None, None, f"FID was not measured: {missing}")
    limit = limits.fid_increase(fid.full_precision)
    low, high = fid.ci95

    def say(where: str) -> str:
        return (
            f"FID changes by {fid.difference:+.3g} (95 % interval {low:+.3g} to {high:+.3g}, "
            f"{fid.samples} image pairs); its lower end is {where} the limit {limit:+.3g}"
        )

    return _check(name, low, limit, say)
