"""Uniform quantizers as pure functions (Q-DiT, arXiv 2406.17343, section 3.1; method.md).

Symmetric: s = max|x| / (2^(b−1)−1), q ∈ [−2^(b−1), 2^(b−1)−1], x̂ = s·q.
Asymmetric: s = (max−min) / (2^b−1), Z = −round(min/s), q ∈ [0, 2^b−1], x̂ = s·(q−Z), where the
range is first extended to include 0 (the authors' code omits this and then loses groups whose
values are all of one sign).
Rounding is to nearest, ties to even, as ONNX QuantizeLinear defines it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .schemes import LayerScheme, ScaleDtype

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


@dataclass(frozen=True)
class QuantizedWeight:
    """Integers and parameters of one weight matrix.

    values: int8 (symmetric) or uint8 (asymmetric) [N, K], unpacked;
    scale: float32 [N, G], already rounded to the scheme's scale dtype;
    zero_point: uint8 [N, G], or None when symmetric. G = K / group size.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int

    @property
    def group_size(self) -> int:
        return self.values.shape[1] // self.scale.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """x̂ = s·(q−Z) as [N, K] of `dtype`."""
        n, k = self.values.shape
        grouped = self.values.reshape(n, -1, self.group_size).to(dtype)
        if self.zero_point is not None:
            grouped = grouped - self.zero_point.to(dtype).unsqueeze(-1)
        return (grouped * self.scale.to(dtype).unsqueeze(-1)).reshape(n, k)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        zero_point = None if self.zero_point is None else self.zero_point.to(device)
        return QuantizedWeight(self.values.to(device), self.scale.to(device), zero_point, self.bits)


def round_scale(scale: Tensor, dtype: ScaleDtype) -> Tensor:
    """Round a positive scale to the stored dtype, kept away from 0, in the input's dtype."""
    stored = scale.clamp(min=MIN_SCALE)
    if dtype == "float16":
        # 65504 is the largest finite float16
        stored = stored.clamp(max=65504.0).to(torch.float16)
    return stored.to(scale.dtype)


def range_parameters(
    low: Tensor, high: Tensor, bits: int, symmetric: bool, scale_dtype: ScaleDtype = "float32"
) -> tuple[Tensor, Tensor]:
    """Scale and zero point for values in [low, high] (any common shape), as float tensors.

    The range is extended to include 0. Symmetric zero points are all 0.
    """
    integers = IntegerRange.of(bits, symmetric)
    low, high = low.clamp(max=0), high.clamp(min=0)
    # a tensor: on CUDA a number would be divided by as a product with its rounded reciprocal
    steps = low.new_full((), integers.steps)
    if symmetric:
        scale = torch.maximum(-low, high) / steps
        return round_scale(scale, scale_dtype), torch.zeros_like(scale)
    scale = round_scale((high - low) / steps, scale_dtype)
    return scale, (-torch.round(low / scale)).clamp(integers.low, integers.high)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, integers: IntegerRange) -> Tensor:
    """q = clamp(round(x/s) + Z), still in x's float dtype; shapes broadcast."""
    return (torch.round(x / scale) + zero_point).clamp(integers.low, integers.high)


def fake_quantize_activation(x: Tensor, scheme: LayerScheme) -> Tensor:
    """Dynamic group-wise quantization and dequantization of x [..., K]: scale [..., K/g].

    The result has x's dtype; float16 and bfloat16 inputs are quantized in float32.
    """
    if not scheme.quantizes_activations:
        return x
    values, scale, zero_point = quantize_activation(x, scheme)
    if not scheme.activation_symmetric:
        values.sub_(zero_point)
    return values.mul_(scale).reshape(x.shape).to(x.dtype)


def quantize_activation(x: Tensor, scheme: LayerScheme) -> tuple[Tensor, Tensor, Tensor]:
    """(q [..., G, g], s [..., G, 1], Z [..., G, 1]) of x [..., K], in float32 or float64.

    In place wherever a tensor is its own, and by amin and amax (aminmax is six times slower on a
    CPU): every linear of the simulation comes through here.
    """
    size = scheme.activation_group_size(x.shape[-1])
    wide = x if x.dtype == torch.float64 else x.float()
    groups = wide.reshape(*x.shape[:-1], -1, size)
    integers = IntegerRange.of(scheme.activation_bits, scheme.activation_symmetric)
    low, high = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    scale, zero_point = range_parameters(
        low, high, scheme.activation_bits, scheme.activation_symmetric
    )
    values = torch.div(groups, scale).round_()
    if not scheme.activation_symmetric:
        values.add_(zero_point)
    return values.clamp_(integers.low, integers.high), scale, zero_point


def pack_values(
    values: Tensor, scale: Tensor, zero_point: Tensor, scheme: LayerScheme
) -> QuantizedWeight:
    """Build a `QuantizedWeight` from float integers q [N, K], s [N, G] and Z [N, G]."""
    if scheme.weight_symmetric:
        return QuantizedWeight(values.to(torch.int8), scale.float(), None, scheme.weight_bits)
    return QuantizedWeight(
        values.to(torch.uint8), scale.float(), zero_point.to(torch.uint8), scheme.weight_bits
    )


def quantize_weight_nearest(weight: Tensor, scheme: LayerScheme) -> QuantizedWeight:
    """Round-to-nearest with the group's full range. weight [N, K], any float dtype."""
    n, k = weight.shape
    groups = weight.float().reshape(n, -1, scheme.weight_group_size(k))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    return quantize_groups(groups, low, high, scheme)


def quantize_groups(
    groups: Tensor, low: Tensor, high: Tensor, scheme: LayerScheme
) -> QuantizedWeight:
    """Quantize groups [N, G, g] with the ranges low, high [N, G, 1]."""
    integers = IntegerRange.of(scheme.weight_bits, scheme.weight_symmetric)
    scale, zero_point = range_parameters(
        low, high, scheme.weight_bits, scheme.weight_symmetric, scheme.scale_dtype
    )
    values = quantize(groups, scale, zero_point, integers).flatten(1)
    return pack_values(values, scale.squeeze(-1), zero_point.squeeze(-1), scheme)


def quantize_weight_mse(
    weight: Tensor, scheme: LayerScheme, steps: int = 40, smallest: float = 0.6
) -> QuantizedWeight:
    """Round-to-nearest with each group's range shrunk to the ratio of least squared error.

    Tries `steps` ratios evenly spaced in (`smallest`, 1], the full range among them, so the error
    is never above round-to-nearest's. weight [N, K].
    """
    n, k = weight.shape
    groups = weight.float().reshape(n, -1, scheme.weight_group_size(k))
    low, high = best_clipping(groups, scheme, steps, smallest)
    return quantize_groups(groups, low, high, scheme)


def best_clipping(
    groups: Tensor, scheme: LayerScheme, steps: int = 40, smallest: float = 0.6
) -> tuple[Tensor, Tensor]:
    """Ranges (low, high) [N, G, 1] of least squared error for groups [N, G, g]."""
    integers = IntegerRange.of(scheme.weight_bits, scheme.weight_symmetric)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    best_low, best_high = low, high
    best_error = torch.full_like(low, torch.inf)
    for step in range(steps):
        ratio = 1.0 - (1.0 - smallest) * step / steps
        scale, zero_point = range_parameters(
            low * ratio,
            high * ratio,
            scheme.weight_bits,
            scheme.weight_symmetric,
            scheme.scale_dtype,
        )
        restored = (quantize(groups, scale, zero_point, integers) - zero_point) * scale
        error = (restored - groups).square().sum(dim=-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_low = torch.where(better, low * ratio, best_low)
        best_high = torch.where(better, high * ratio, best_high)
    return best_low, best_high
