"""How much each linear's group sizes cost in the finished images.

One linear at a time is quantized, one side at a time, in a denoiser otherwise at full precision; a
few images are sampled with it, and the error is their mean squared distance from the
full-precision images of the same noise: what the rest of the network and the rest of the sampler
make of it. One group size a side is measured this way; the others follow in proportion to the
error at the linear's own output (`local_errors.py`). A plan's error is the sum over linears and
sides: errors of different layers are independent, so their squares add up.

Why whole trajectories: a quantized weight errs in nearly the same direction at every step, and
these errors add up in amplitude. On the demo the squared errors of single denoiser calls, weighted
by what each step is worth, predict images 10 dB too good and rank the layers wrongly; the sum over
trajectories is within 0.3 dB (docs/performance.md).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import InputError
from ...files import sha256_of_json, write_json
from ...progress import Progress, Silent
from ..hessian import exact_float32
from ..sampling import SamplingSettings, sample_images
from ..schemes import ActivationGroup, LayerScheme, WeightGroup
from .local_errors import activation_schemes
from .space import SearchSpace
from .switchable import CandidateDenoiser

_SILENT = Silent()
_MEASURED_AT = 128  # the group size nearest this one is measured
Side = Literal["weight", "activation"]


@dataclass(frozen=True)
class SensitivitySettings:
    """The images behind every measurement, all from the same noise."""

    sampling: SamplingSettings
    images: int

    def __post_init__(self) -> None:
        if self.images < 1:
            raise InputError(f"sensitivity needs at least 1 image, got {self.images}")


@dataclass(frozen=True)
class ErrorTable:
    """Mean squared image errors (values in [-1, 1]) by linear name and group of either side."""

    weight: Mapping[str, Mapping[WeightGroup, float]]
    activation: Mapping[str, Mapping[ActivationGroup, float]]

    def of(self, name: str, scheme: LayerScheme) -> float:
        """Error of one linear under `scheme`."""
        error = 0.0
        if scheme.quantizes_weights:
            error += self.weight[name][scheme.weight_group]
        if scheme.quantizes_activations:
            error += self.activation[name][scheme.activation_group]
        return error

    def choice_errors(self, space: SearchSpace) -> dict[str, tuple[float, ...]]:
        """Errors of every linear's choices, in the order of the space."""
        return {
            name: tuple(self.of(name, scheme) for scheme in choices)
            for name, choices in space.choices.items()
        }


def measure_sensitivity(
    candidate: CandidateDenoiser,
    space: SearchSpace,
    weight_shapes: Mapping[str, Mapping[WeightGroup, float]],
    activation_shapes: Mapping[str, Mapping[ActivationGroup, float]],
    settings: SensitivitySettings,
    *,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    progress: Progress = _SILENT,
    folder: Path | None = None,
) -> ErrorTable:
    """Measure each linear and side of `space` once; leaves the candidate in full precision.

    The shapes are `local_errors.weight_shapes` and `.activation_shapes`. With `folder`, finished
    measurements are kept there and taken over by a run of the same cache and settings.
    """
    run = _Measurement(candidate, settings, batch_size, device)
    measured = _read(folder, candidate, settings)
    todo = list(_measurements(space))
    with exact_float32():
        for name, side, scheme in progress.track(todo, "sensitivity of each linear", len(todo)):
            key = f"{name}|{side}|{_group(side, scheme)}"
            if key not in measured:
                measured[key] = run.error(name, side, scheme)
                _write(folder, candidate, settings, measured)
    table: dict[Side, dict[str, dict[Any, float]]] = {"weight": {}, "activation": {}}
    shapes: dict[Side, Mapping[str, Mapping[Any, float]]] = {
        "weight": weight_shapes,
        "activation": activation_shapes,
    }
    for name, side, scheme in todo:
        group = _group(side, scheme)
        shape = shapes[side][name]
        level = measured[f"{name}|{side}|{group}"] / max(shape[group], 1e-300)
        table[side][name] = {other: level * value for other, value in shape.items()}
    return ErrorTable(table["weight"], table["activation"])


class _Measurement:
    """Image errors of a candidate with a single linear quantized."""

    def __init__(
        self,
        candidate: CandidateDenoiser,
        settings: SensitivitySettings,
        batch_size: int,
        device: torch.device | str,
    ) -> None:
        self._candidate = candidate
        self._settings = settings
        self._batch_size = batch_size
        self._device = device
        self._expected: Tensor | None = None

    def error(self, name: str, side: Side, scheme: LayerScheme) -> float:
        if self._expected is None:
            self._candidate.reset()
            self._expected = self._images()
        linear = self._candidate.linears[name]
        if side == "weight":
            linear.use(scheme.weight_group, None)
        else:
            linear.use(None, scheme)
        images = self._images()
        linear.use(None, None)
        return (images - self._expected).square().mean().item()

    def _images(self) -> Tensor:
        """Latents or pixels, float64, clamped as pixels are where there is no VAE."""
        model = self._candidate.model
        samples = sample_images(
            model,
            model.as_denoiser(self._candidate.module),
            self._settings.sampling,
            range(self._settings.images),
            batch_size=self._batch_size,
            device=self._device,
        ).double()
        return samples if model.vae is not None else samples.clamp(-1, 1)


def _measurements(space: SearchSpace) -> Iterator[tuple[str, Side, LayerScheme]]:
    """(linear, side, scheme with the group to measure) for everything there is to measure."""
    for spec in space.linears:
        k = spec.in_features
        sides = [scheme for scheme in space.choices[spec.name] if scheme.quantizes_weights]
        if sides:
            nearest = min(sides, key=lambda s: abs(s.weight_group_size(k) - _MEASURED_AT))
            yield spec.name, "weight", nearest
        inputs = activation_schemes(space, spec.name)
        if inputs:
            nearest = min(inputs, key=lambda s: abs(s.activation_group_size(k) - _MEASURED_AT))
            yield spec.name, "activation", nearest


def _group(side: Side, scheme: LayerScheme) -> WeightGroup | ActivationGroup:
    return scheme.weight_group if side == "weight" else scheme.activation_group


def _key(candidate: CandidateDenoiser, settings: SensitivitySettings) -> str:
    return sha256_of_json({"cache": candidate.digest, "settings": asdict(settings)})


def _read(
    folder: Path | None, candidate: CandidateDenoiser, settings: SensitivitySettings
) -> dict[str, float]:
    """Measurements that an earlier run left; none where they are another's or unreadable."""
    if folder is None:
        return {}
    try:
        kept = json.loads((folder / _KEPT).read_text(encoding="utf-8"))
        if kept["key"] != _key(candidate, settings):
            return {}
        return {str(name): float(value) for name, value in kept["errors"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write(
    folder: Path | None,
    candidate: CandidateDenoiser,
    settings: SensitivitySettings,
    measured: Mapping[str, float],
) -> None:
    if folder is not None:
        value = {"key": _key(candidate, settings), "errors": dict(measured)}
        write_json(folder / _KEPT, value)


_KEPT = "sensitivity.json"
