"""Ranges of integers, stored scales and rounding: the values that ONNX and float16 prescribe."""

from __future__ import annotations

import pytest
import torch

from qdit.calibrate.integers import MIN_SCALE, IntegerRange, quantize, round_scale
from qdit.calibrate.schemes import ScaleDtype


def test_ties_go_to_the_even_integer() -> None:
    scale, zero = torch.tensor(1.0), torch.tensor(0.0)
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    assert quantize(x, scale, zero, IntegerRange(-8, 7)).tolist() == [-2, -2, 0, 0, 2, 2, 4]


@pytest.mark.parametrize(
    ("bits", "symmetric", "expected"),
    [
        (4, True, (-8, 7, 7)),
        (4, False, (0, 15, 15)),
        (2, True, (-2, 1, 1)),
        (8, True, (-128, 127, 127)),
        (8, False, (0, 255, 255)),
    ],
)
def test_integer_ranges(bits: int, symmetric: bool, expected: tuple[int, int, int]) -> None:
    integers = IntegerRange.of(bits, symmetric)
    assert (integers.low, integers.high, integers.steps) == expected


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_scales_are_never_zero_nor_infinite_once_stored(dtype: ScaleDtype) -> None:
    scale = torch.tensor([0.0, 1e-30, MIN_SCALE, 0.1, 65504.0, 1e9])
    stored = round_scale(scale, dtype)
    assert (stored >= MIN_SCALE).all()
    if dtype == "float16":
        assert stored.to(torch.float16).isfinite().all()
        assert torch.equal(stored.to(torch.float16).float(), stored)
        assert stored.max() == 65504
    else:
        assert torch.equal(stored[2:], scale[2:])
