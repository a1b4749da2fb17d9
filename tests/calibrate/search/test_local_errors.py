"""Errors at a linear's own output, against a float64 restatement in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qdit.calibrate.block_store import LayerError
from qdit.calibrate.schemes import LayerScheme
from qdit.calibrate.search.local_errors import activation_shapes, weight_shapes
from qdit.calibrate.search.space import search_space
from qdit.calibrate.search.weight_cache import WeightCache
from qdit.calibrate.trajectories import CalibrationSet

Array = NDArray[np.float64]


def quantized(x: Array, bits: int, size: int, symmetric: bool) -> Array:
    """Q-DiT section 3.1 for rows x [n, K] in groups of `size`: s·clip(round(x/s) + Z) − s·Z."""
    groups = x.reshape(len(x), -1, size)
    low = np.minimum(groups.min(-1, keepdims=True), 0)
    high = np.maximum(groups.max(-1, keepdims=True), 0)
    if symmetric:
        least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        scale, zero = np.maximum(-low, high) / most, np.zeros_like(low)
    else:
        least, most = 0, 2**bits - 1
        scale = (high - low) / most
        zero = -np.round(low / scale)
    integers = np.clip(np.round(groups / scale) + zero, least, most)
    return np.asarray(((integers - zero) * scale).reshape(x.shape))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_activation_shapes_of_every_linear(
    symmetric: bool, tiny: Any, calibration: CalibrationSet
) -> None:
    scheme = LayerScheme(activation_bits=6, activation_symmetric=symmetric)
    space = search_space(tiny.model.linears, scheme, "w4a6")
    seen: dict[str, list[Array]] = {name: [] for name in space.choices}
    handles = [
        tiny.model.denoiser.get_submodule(name).register_forward_pre_hook(
            lambda _, given, name=name: seen[name].append(given[0].flatten(0, -2).double().numpy())
        )
        for name in space.choices
    ]
    with torch.no_grad():
        tiny.model.family.forward(tiny.model.denoiser, *calibration.tensors)
    for handle in handles:
        handle.remove()
    found = activation_shapes(tiny.model, space, calibration, batch_size=5)
    # adaLN linears are weight-only
    assert set(found) == {s.name for s in space.linears if s.role != "adaln"}
    for name, groups in found.items():
        assert tuple(groups) == space.activation_groups(name)
        x = np.concatenate(seen[name])
        weight = tiny.model.denoiser.get_submodule(name).weight.double().numpy()
        for group, value in groups.items():
            size = x.shape[1] if group == "token" else int(group)
            error = (quantized(x, 6, size, symmetric) - x) @ weight.T
            expected = np.square(error).sum() / np.square(x @ weight.T).sum()
            assert value == pytest.approx(expected, rel=3e-3), (name, group)


def test_a_model_keeps_no_hooks(tiny: Any, calibration: CalibrationSet) -> None:
    activation_shapes(tiny.model, tiny.space, calibration)
    assert not any(module._forward_pre_hooks for module in tiny.model.denoiser.modules())


def test_weight_shapes_are_squared_errors_of_outputs_where_there_are_any() -> None:
    errors = {
        "run": {32: LayerError(weight=0.5, output=0.25), "channel": LayerError(0.75, 0.5)},
        "not run": {32: LayerError(weight=0.5, output=None)},
        "exact": {32: LayerError(weight=0.5, output=0.0)},  # inputs that no error meets
    }
    assert weight_shapes(WeightCache({}, "", errors)) == {
        "run": {32: 0.0625, "channel": 0.25},
        "not run": {32: 0.25},
        "exact": {32: 0.0},
    }
