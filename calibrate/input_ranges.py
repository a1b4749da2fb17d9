"""What a linear's input looks like over all timesteps: what static scales are chosen from.

A static scale is fixed when an engine is built, so it has to serve every timestep. The inputs of a
DiT vary strongly with it (method.md): the ranges are kept by timestep, so that a report can show
what one scale has to cover.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..progress import Progress, Silent
from .calibration_set import CalibrationSet
from .families.base import Family
from .integers import MIN_SCALE, IntegerRange
from .plan import LinearSpec

StaticMethod = Literal["mse", "max"]

# Magnitudes are counted in bins of 1/16 octave from 2^-24 to 2^24: 4.4 % wide, whatever the scale.
_BINS_AN_OCTAVE = 16
_LOWEST_OCTAVE, _HIGHEST_OCTAVE = -24, 24
_BINS = _BINS_AN_OCTAVE * (_HIGHEST_OCTAVE - _LOWEST_OCTAVE)
# The clips that are tried, as shares of the largest magnitude.
_LEAST_CLIP = 0.02
_CLIPS = 200


@dataclass
class InputRange:
    """Statistics of one input [..., K] over a calibration set.

    channels: largest |x| of each channel, float32 [K]; timesteps: largest |x| by timestep;
    counts: how many values have a magnitude in each of the bins.
    """

    name: str
    channels: Tensor
    timesteps: dict[int, float] = field(default_factory=dict)
    counts: Tensor = field(default_factory=lambda: torch.zeros(_BINS, dtype=torch.int64))

    @property
    def largest(self) -> float:
        return float(self.channels.max())

    def add(self, x: Tensor, timesteps: Tensor) -> None:
        """Count in x [B, ..., K], whose first dimension belongs to `timesteps` [B]."""
        magnitude = x.detach().abs().float()
        by_sample = magnitude.flatten(1).amax(dim=1).cpu()
        for timestep, value in zip(timesteps.tolist(), by_sample.tolist(), strict=True):
            self.timesteps[timestep] = max(self.timesteps.get(timestep, 0.0), value)
        self.channels = torch.maximum(self.channels, magnitude.flatten(0, -2).amax(dim=0).cpu())
        octaves = torch.log2(magnitude.clamp(min=2.0**_LOWEST_OCTAVE))
        bins = ((octaves - _LOWEST_OCTAVE) * _BINS_AN_OCTAVE).long().clamp(0, _BINS - 1)
        self.counts += torch.bincount(bins.flatten(), minlength=_BINS).cpu()

    def static_scale(self, bits: int = 8, method: StaticMethod = "mse") -> float:
        """One symmetric scale for every timestep.

        'max' covers the largest magnitude: s = max|x| / (2^(b-1)-1). 'mse' clips where that makes
        the mean squared error smallest, by the counts: within the range an error is uniform,
        s²/12, below half a step it is the value itself, and beyond the range what is cut off.
        """
        steps = IntegerRange.of(bits, True).steps
        widest = max(self.largest / steps, MIN_SCALE)
        if method == "max":
            return widest
        if method != "mse":
            raise InputError(f"static scales are chosen by mse or max, got {method!r}")
        clips = torch.linspace(_LEAST_CLIP, 1.0, _CLIPS, dtype=torch.float64) * widest
        centres = _centres()
        counts = self.counts.double()
        errors = [_squared_error(centres, counts, float(scale), steps) for scale in clips]
        return max(float(clips[min(range(_CLIPS), key=errors.__getitem__)]), MIN_SCALE)

    def clipped_share(self, scale: float, bits: int = 8) -> float:
        """The share of values beyond the range of `scale`, to within a bin."""
        limit = scale * (IntegerRange.of(bits, True).steps + 0.5)
        beyond = self.counts[_centres() > limit].sum()
        return float(beyond) / max(1, int(self.counts.sum()))


def _centres() -> Tensor:
    places = torch.arange(_BINS, dtype=torch.float64) + 0.5
    return torch.exp2(places / _BINS_AN_OCTAVE + _LOWEST_OCTAVE)


def _squared_error(centres: Tensor, counts: Tensor, scale: float, steps: int) -> float:
    uniform = torch.full_like(centres, scale * scale / 12)
    beyond = (centres - steps * scale) ** 2
    error = torch.where(centres < scale / 2, centres**2, uniform)
    error = torch.where(centres > (steps + 0.5) * scale, beyond, error)
    return float((counts * error).sum())


def collect_input_ranges(
    family: Family,
    denoiser: nn.Module,
    linears: Sequence[LinearSpec],
    samples: CalibrationSet,
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> dict[str, InputRange]:
    """The ranges of every input that `linears` read, by `LinearSpec.input_name`.

    `denoiser` runs as it is, on its own device: full precision, or a checkpoint's simulation, whose
    inputs carry the rounding of the layers before. Linears that read one value are counted once.
    Raises `InputError` for inputs that hold NaN or infinity.
    """
    if not linears:
        raise InputError("ranges need at least one linear, got none")
    first: dict[str, LinearSpec] = {}
    for spec in linears:
        first.setdefault(spec.input_name, spec)
    ranges = {name: InputRange(name, torch.zeros(spec.in_features)) for name, spec in first.items()}
    device = next(denoiser.parameters()).device
    batches = list(samples.batches(batch_size))
    for batch in (progress or Silent()).track(batches, "measuring input ranges", len(batches)):
        with torch.inference_mode(), _watched(denoiser, first.values(), ranges, batch.timestep):
            family.forward(denoiser, *(tensor.to(device) for tensor in batch.tensors))
    for entry in ranges.values():
        if not math.isfinite(entry.largest):
            raise InputError(
                f"{entry.name} holds NaN or infinity on the calibration set; check the model"
            )
    return ranges


@contextmanager
def _watched(
    denoiser: nn.Module,
    specs: Iterable[LinearSpec],
    ranges: dict[str, InputRange],
    timesteps: Tensor,
) -> Iterator[None]:
    handles = []
    for spec in specs:

        def count(_module: nn.Module, given: Any, name: str = spec.input_name) -> None:
            ranges[name].add(given[0], timesteps)

        handles.append(denoiser.get_submodule(spec.name).register_forward_pre_hook(count))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
