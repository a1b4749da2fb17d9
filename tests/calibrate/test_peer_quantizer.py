"""Round-to-nearest weights against the Q-DiT authors' quantizer: its formula, and its code.

The code (github Juanerx/Q-DiT, qdit/quant.py, `quantize_tensor`) is run where the environment
variable QDIT_PEER_QDIT names a clone of it.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qdit.calibrate.quantizers import quantize_weight_nearest
from qdit.calibrate.schemes import LayerScheme

PEER = os.environ.get("QDIT_PEER_QDIT")
GROUPS = (32, 64, 96, 128, 192, 288, 576, 1152, "channel")


def random_weight(n: int = 48, k: int = 1152, seed: int = 0) -> Tensor:
    """Float32 with columns of very different scale, as trained weights have."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) / k**0.5
    return weight * torch.logspace(-1, 1, k)[torch.randperm(k, generator=generator)]


def authors_formula(
    weight: Tensor, bits: int, group: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """`quantize_tensor` with quant_method 'max' and clip_ratio 1.0, restated in float64.

    Also which weights [N, K] float32 may round to the other side: those, or whose zero point, lie
    within float32's precision of a tie.
    """
    groups = weight.double().reshape(-1, group)
    if symmetric:
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        scale = groups.abs().amax(1, keepdim=True).clamp(min=1e-5) / high
        base, unsure = torch.zeros_like(scale), torch.zeros_like(scale, dtype=torch.bool)
    else:
        low, high = 0, 2**bits - 1
        largest, smallest = groups.amax(1, keepdim=True), groups.amin(1, keepdim=True)
        scale = (largest - smallest).clamp(min=1e-5) / high
        base = torch.round(-smallest / scale).clamp(low, high)
        unsure = near_tie(smallest / scale)
    integers = torch.clamp(torch.round(groups / scale) + base, low, high)
    unsure = unsure | near_tie(groups / scale)
    return ((integers - base) * scale).reshape(weight.shape), unsure.reshape(weight.shape)


def near_tie(x: Tensor) -> Tensor:
    # |x| < 256 here, so float32 quotients are off by less than 256 · 2^-24 · 1.5
    return (x.frac().abs() - 0.5).abs() < 3e-5


def scheme_of(bits: int, group: Any, symmetric: bool) -> LayerScheme:
    return LayerScheme(bits, 16, group, weight_symmetric=symmetric, scale_dtype="float32")


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference as a share of the largest weight."""
    return ((ours.double() - theirs.double()).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_equals_the_authors_formula(bits: int, group: Any, symmetric: bool) -> None:
    weight = random_weight()
    size = 1152 if group == "channel" else group
    ours = quantize_weight_nearest(weight, scheme_of(bits, group, symmetric))
    # every group here has both signs: where one has not, their range misses 0 (method.md)
    theirs, unsure = authors_formula(weight, bits, size, symmetric)
    assert unsure.double().mean() < 0.01
    sure = ours.dequantize().where(~unsure, theirs.float())
    assert relative_difference(sure, theirs) < 3e-7


@pytest.mark.skipif(PEER is None, reason="QDIT_PEER_QDIT names no clone of Juanerx/Q-DiT")
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_equals_the_authors_code(bits: int, group: Any, symmetric: bool) -> None:
    path = Path(str(PEER)) / "qdit" / "quant.py"
    spec = importlib.util.spec_from_file_location("authors_quant", path)
    assert spec is not None and spec.loader is not None, f"no module at {path}"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    weight = random_weight(seed=1)
    size = 1152 if group == "channel" else group
    theirs = module.quantize_tensor(weight.clone(), bits, size, tiling=0, sym=symmetric)
    ours = quantize_weight_nearest(weight, scheme_of(bits, group, symmetric))
    assert torch.equal(ours.dequantize(), theirs)


def test_a_group_of_one_sign_keeps_its_values() -> None:
    # the fault that is not reproduced: 5, 5.25, 5.5, … come back from their formula as ones
    weight = torch.linspace(5, 6, 32).reshape(1, 32)
    ours = quantize_weight_nearest(weight, scheme_of(4, 32, False)).dequantize()
    assert (ours - weight).abs().max() <= 0.5 * 6 / 15 + 1e-6
    assert (authors_formula(weight, 4, 32, False)[0] - weight).abs().max() > 4
