"""How one linear's error at its own output changes with its group size: the shape of its curve.

A group size scales a layer's error much as it scales the error at the layer's own output, which
costs one product to measure. How much that error then matters is a factor of the layer alone,
which costs whole trajectories (`sensitivity.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...progress import Progress, Silent
from ..model import DiffusionModel
from ..quantizers import fake_quantize_activation
from ..schemes import ActivationGroup, LayerScheme, WeightGroup
from ..trajectories import CalibrationSet
from .space import SearchSpace
from .weight_cache import WeightCache

_SILENT = Silent()


def weight_shapes(cache: WeightCache) -> dict[str, dict[WeightGroup, float]]:
    """Squared relative errors by linear and weight group: of the output where calibration inputs
    were run, else of the weights."""
    return {
        name: {
            group: (error.weight if error.output is None else error.output) ** 2
            for group, error in groups.items()
        }
        for name, groups in cache.errors.items()
    }


@torch.inference_mode()
def activation_shapes(
    model: DiffusionModel,
    space: SearchSpace,
    samples: CalibrationSet,
    *,
    batch_size: int = 8,
    progress: Progress = _SILENT,
) -> dict[str, dict[ActivationGroup, float]]:
    """‖(Q(x) − x)Wᵀ‖² / ‖xWᵀ‖² by linear and activation group, on the model's own inputs x.

    One pass of the full-precision model over `samples`.
    """
    sums: dict[str, dict[ActivationGroup, Tensor]] = {}
    schemes = {name: activation_schemes(space, name) for name in space.choices}
    with _recorded(model.denoiser, schemes, sums):
        batches = list(samples.batches(batch_size))
        for batch in progress.track(batches, "errors of activation groups", len(batches)):
            inputs = [part.to(model.device) for part in batch.tensors]
            model.family.forward(model.denoiser, *inputs)
    return {
        name: {
            group: float(error / totals[_WHOLE].clamp(min=1e-300))
            for group, error in totals.items()
            if group != _WHOLE
        }
        for name, totals in sums.items()
    }


def activation_schemes(space: SearchSpace, name: str) -> list[LayerScheme]:
    """One scheme for each activation group of a linear; none where it is weight-only."""
    found: dict[ActivationGroup, LayerScheme] = {}
    for scheme in space.choices[name]:
        if scheme.quantizes_activations:
            found.setdefault(scheme.activation_group, scheme)
    return list(found.values())


_WHOLE: Any = 0  # the key of ‖xWᵀ‖², no group size


@contextmanager
def _recorded(
    denoiser: nn.Module,
    schemes: Mapping[str, list[LayerScheme]],
    sums: dict[str, dict[ActivationGroup, Tensor]],
) -> Iterator[None]:
    """Add up the squared errors of every call of the linears inside."""
    handles = [
        denoiser.get_submodule(name).register_forward_pre_hook(_recorder(own, sums, name))
        for name, own in schemes.items()
        if own
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _recorder(
    schemes: list[LayerScheme], sums: dict[str, dict[ActivationGroup, Tensor]], name: str
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def record(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x, weight = arguments[0], module.get_parameter("weight")
        totals = sums.setdefault(name, {})
        _add(totals, _WHOLE, functional.linear(x, weight))
        for scheme in schemes:
            error = fake_quantize_activation(x, scheme) - x
            _add(totals, scheme.activation_group, functional.linear(error, weight))

    return record


def _add(totals: dict[ActivationGroup, Tensor], key: ActivationGroup, values: Tensor) -> None:
    total = values.double().square().sum()
    totals[key] = total + totals[key] if key in totals else total
