"""How much each linear's group sizes cost at the denoiser's output.

One linear at a time is quantized, one side at a time, in a network otherwise at full precision; the
error is that of the predicted noise after all remaining blocks, so it holds what the rest of the
network amplifies or forgets. The choice (weight group, activation group) of a linear costs the sum
of its two sides, and a plan the sum over its linears: independent small errors add up in squares.

Each calibration sample's squared error is weighted by what an error at its timestep is worth in
the finished image (`gains.py`), so a plan's sum estimates the images' mean squared error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ...progress import Progress, Silent
from ..carried import CarriedInputs
from ..families.base import BlockInputs
from ..hessian import exact_float32
from ..schemes import ActivationGroup, LayerScheme, WeightGroup
from ..trajectories import CalibrationSet
from .space import SearchSpace
from .switchable import CandidateDenoiser

_SILENT = Silent()


@dataclass(frozen=True)
class ErrorTable:
    """Weighted mean squared output errors, by linear name and group of either side."""

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

    def to_json(self) -> dict[str, Any]:
        sides: dict[str, Mapping[str, Mapping[Any, float]]] = {
            "weight": self.weight,
            "activation": self.activation,
        }
        return {
            side: {name: {str(g): e for g, e in groups.items()} for name, groups in table.items()}
            for side, table in sides.items()
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ErrorTable:
        """The inverse of `to_json`."""
        read = {
            side: {
                name: {int(g) if g.isdigit() else g: float(e) for g, e in groups.items()}
                for name, groups in value[side].items()
            }
            for side in ("weight", "activation")
        }
        return cls(read["weight"], read["activation"])


def measure_sensitivity(
    candidate: CandidateDenoiser,
    space: SearchSpace,
    samples: CalibrationSet,
    weights: Tensor,
    *,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    progress: Progress = _SILENT,
) -> ErrorTable:
    """Measure every linear and group of `space` once on `samples`, with `weights` float [S] a
    sample. Leaves the candidate in full precision. Raises `InputError` for other weights."""
    if weights.shape != (len(samples),):
        raise InputError(
            f"sensitivity needs one weight a sample, got {list(weights.shape)} for {len(samples)}"
        )
    candidate.reset()
    run = _Measurement(candidate, space, batch_size, torch.device(device))
    with torch.inference_mode(), exact_float32():
        return run.table(samples, weights.to(device), progress)


class _Measurement:
    """One run of `measure_sensitivity`."""

    def __init__(
        self,
        candidate: CandidateDenoiser,
        space: SearchSpace,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self._candidate = candidate
        self._space = space
        self._batch_size = batch_size
        self._device = device
        self._model = candidate.model
        self._denoiser = candidate.denoiser
        self._blocks = self._model.family.blocks(candidate.denoiser)

    def table(self, samples: CalibrationSet, weights: Tensor, progress: Progress) -> ErrorTable:
        model = self._model
        carried = CarriedInputs(model, samples, self._batch_size, self._device)
        expected = [self._noise(inputs, 0) for inputs in carried]
        parts = weights.split(self._batch_size)
        table = ErrorTable({}, {})
        count = sum(len(list(_switches(self._space, number))) for number in self._numbers())
        done = progress.track(range(count), "sensitivity of each linear and group", count)
        for number, block in enumerate(self._blocks):
            for name, side, group, switch in _switches(self._space, number):
                switch(self._candidate)
                error = sum(
                    self._error(inputs, number, noise, part)
                    for inputs, noise, part in zip(carried, expected, parts, strict=True)
                )
                self._candidate.linears[name].use(None, None)
                entries: Any = getattr(table, side)
                entries.setdefault(name, {})[group] = float(error)
                next(done)
            if number + 1 < len(self._blocks):
                for batch, inputs in enumerate(carried):
                    carried.replace(batch, model.family.run_block(block, inputs))
        for _ in done:  # lets the progress bar end
            pass
        return table

    def _numbers(self) -> range:
        return range(len(self._blocks))

    def _error(self, inputs: BlockInputs, block: int, expected: Tensor, weights: Tensor) -> Tensor:
        difference = (self._noise(inputs, block) - expected).double()
        return (difference.square().flatten(1).mean(1) * weights).sum()

    def _noise(self, inputs: BlockInputs, first: int) -> Tensor:
        """The predicted noise [B, C, H, W] from the inputs of block `first` on."""
        family = self._model.family
        for block in list(self._blocks)[first:]:
            inputs = BlockInputs(family.run_block(block, inputs), inputs.shared)
        return family.noise_prediction(self._denoiser, family.after_blocks(self._denoiser, inputs))


def _switches(
    space: SearchSpace, block: int
) -> Iterable[tuple[str, str, WeightGroup | ActivationGroup, Callable[[CandidateDenoiser], None]]]:
    """(linear, side, group, what turns it on) for everything to measure in one block."""
    for spec in space.linears:
        if spec.block != block:
            continue
        for weight_group in space.weight_groups(spec.name):
            yield spec.name, "weight", weight_group, _weight_switch(spec.name, weight_group)
        for scheme in _activation_schemes(space, spec.name):
            group = scheme.activation_group
            yield spec.name, "activation", group, _activation_switch(spec.name, scheme)


def _weight_switch(name: str, group: WeightGroup) -> Callable[[CandidateDenoiser], None]:
    return lambda candidate: candidate.linears[name].use(group, None)


def _activation_switch(name: str, scheme: LayerScheme) -> Callable[[CandidateDenoiser], None]:
    return lambda candidate: candidate.linears[name].use(None, scheme)


def _activation_schemes(space: SearchSpace, name: str) -> list[LayerScheme]:
    """One scheme for each activation group of a linear."""
    found: dict[ActivationGroup, LayerScheme] = {}
    for scheme in space.choices[name]:
        if scheme.quantizes_activations:
            found.setdefault(scheme.activation_group, scheme)
    return list(found.values())
