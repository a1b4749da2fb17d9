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
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
_NEGLIGIBLE = 0.05  # activations that cost less than this share of the weights' error


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
    kept = _Kept(folder, candidate, settings)
    run = _Measurement(candidate, kept, settings, batch_size, device)
    with exact_float32():
        weight = run.weights(space, weight_shapes, progress)
        everything = sum(groups[_nearest(list(groups))] for groups in weight.values())
        activation = run.activations(space, activation_shapes, everything, progress)
    return ErrorTable(weight, activation)


class _Measurement:
    """Image errors of a candidate with one side of one linear quantized, or of all linears."""

    def __init__(
        self,
        candidate: CandidateDenoiser,
        kept: _Kept,
        settings: SensitivitySettings,
        batch_size: int,
        device: torch.device | str,
    ) -> None:
        self._candidate = candidate
        self._kept = kept
        self._settings = settings
        self._batch_size = batch_size
        self._device = device
        self._expected: Tensor | None = None

    def weights(
        self,
        space: SearchSpace,
        shapes: Mapping[str, Mapping[WeightGroup, float]],
        progress: Progress,
    ) -> dict[str, dict[WeightGroup, float]]:
        """Every linear with quantized weights, one at a time."""
        names = [name for name in space.choices if space.weight_groups(name)]
        table: dict[str, dict[WeightGroup, float]] = {}
        for name in progress.track(names, "sensitivity of each linear's weights", len(names)):
            group = _nearest(space.weight_groups(name))
            error = self._error(f"{name}|weight|{group}", {name: (group, None)})
            table[name] = _in_proportion(shapes[name], error, shapes[name][group])
        return table

    def activations(
        self,
        space: SearchSpace,
        shapes: Mapping[str, Mapping[ActivationGroup, float]],
        weight_error: float,
        progress: Progress,
    ) -> dict[str, dict[ActivationGroup, float]]:
        """All linears' coarsest activations at once; if that is next to nothing beside
        `weight_error` it is shared out by the local errors, else each is measured by itself."""
        schemes = {name: activation_schemes(space, name) for name in space.choices}
        coarsest = {name: own[-1] for name, own in schemes.items() if own}
        if not coarsest:
            return {}
        sides = sha256_of_json({name: _side(own) for name, own in coarsest.items()})
        together = self._error(
            f"all|activation|{sides}", {name: (None, own) for name, own in coarsest.items()}
        )
        if together < _NEGLIGIBLE * weight_error:
            whole = sum(shapes[name][own.activation_group] for name, own in coarsest.items())
            return {name: _in_proportion(shapes[name], together, whole) for name in coarsest}
        table: dict[str, dict[ActivationGroup, float]] = {}
        tracked = progress.track(coarsest, "sensitivity of each linear's input", len(coarsest))
        for name in tracked:
            group = _nearest([own.activation_group for own in schemes[name]])
            scheme = next(own for own in schemes[name] if own.activation_group == group)
            error = self._error(f"{name}|activation|{_side(scheme)}", {name: (None, scheme)})
            table[name] = _in_proportion(shapes[name], error, shapes[name][group])
        return table

    def _error(
        self, key: str, changes: Mapping[str, tuple[WeightGroup | None, LayerScheme | None]]
    ) -> float:
        """Mean squared error of the images with `changes` and nothing else, unless it is kept."""
        known = self._kept.errors.get(key)
        if known is not None:
            return known
        if self._expected is None:
            self._candidate.reset()
            self._expected = self._images()
        for name, (group, activation) in changes.items():
            self._candidate.linears[name].use(group, activation)
        error = (self._images() - self._expected).square().mean().item()
        for name in changes:
            self._candidate.linears[name].use(None, None)
        self._kept.add(key, error)
        return error

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


def _in_proportion(shape: Mapping[Any, float], error: float, measured: float) -> dict[Any, float]:
    """`error` belongs to the shape's value `measured`; the other groups in proportion."""
    return {group: error * value / max(measured, 1e-300) for group, value in shape.items()}


def _nearest(groups: Sequence[Any]) -> Any:
    return min(groups, key=lambda group: abs(_size(group) - _MEASURED_AT))


def _side(scheme: LayerScheme) -> str:
    """The activation side: the cache, whose digest is in the key, knows the weight side only."""
    symmetry = "symmetric" if scheme.activation_symmetric else "asymmetric"
    return f"a{scheme.activation_bits} {scheme.activation_group} {symmetry}"


def _size(group: WeightGroup | ActivationGroup) -> float:
    """'channel' and 'token' are coarser than every number."""
    return group if isinstance(group, int) else math.inf


class _Kept:
    """Finished measurements in a folder, for a run of the same cache and settings."""

    def __init__(
        self, folder: Path | None, candidate: CandidateDenoiser, settings: SensitivitySettings
    ) -> None:
        self._path = None if folder is None else folder / _KEPT
        self._key = sha256_of_json({"cache": candidate.digest, "settings": asdict(settings)})
        self.errors = self._read()

    def add(self, name: str, error: float) -> None:
        """Remember one measurement, on disk at once."""
        self.errors[name] = error
        if self._path is not None:
            write_json(self._path, {"key": self._key, "errors": self.errors})

    def _read(self) -> dict[str, float]:
        """What an earlier run left; nothing where it is another's or unreadable."""
        if self._path is None:
            return {}
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            if kept["key"] != self._key:
                return {}
            return {str(name): float(value) for name, value in kept["errors"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}


_KEPT = "sensitivity.json"
