"""What every quantizer starts from: ranges of integers, stored scales, and rounding to nearest.

Rounding is to nearest, ties to even, as ONNX QuantizeLinear defines it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .schemes import ScaleDtype

# The smallest divisor of a dynamic scale. An all-zero group divides by it and stays zero.
# It is a normal float32 far below any activation; the exported graph uses the same constant.
MIN_SCALE = 2.0**-24


@dataclass(frozen=True)
class IntegerRange:
    """The closed range of stored integers."""

    low: int
    high: int

    @classmethod
    def of(cls, bits: int, symmetric: bool) -> IntegerRange:
        if symmetric:
            return cls(-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
        return cls(0, (1 << bits) - 1)

    @property
    def steps(self) -> int:
        """Denominator of the scale: largest magnitude (symmetric) or number of steps."""
        return self.high if self.low < 0 else self.high - self.low


def round_scale(scale: Tensor, dtype: ScaleDtype) -> Tensor:
    """Round a positive scale to the stored dtype, kept away from 0, in the input's dtype."""
    stored = scale.clamp(min=MIN_SCALE)
    if dtype == "float16":
        # 65504 is the largest finite float16
        stored = stored.clamp(max=65504.0).to(torch.float16)
    return stored.to(scale.dtype)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, integers: IntegerRange) -> Tensor:
    """q = clamp(round(x/s) + Z), still in x's float dtype; shapes broadcast."""
    return (torch.round(x / scale) + zero_point).clamp(integers.low, integers.high)
