"""Uniform quantizers as pure functions (Q-DiT, arXiv 2406.17343, section 3.1; method.md).

Symmetric: s = max|x| / (2^(b−1)−1), q ∈ [−2^(b−1), 2^(b−1)−1], x̂ = s·q.
Asymmetric: s = (max−min) / (2^b−1), Z = −round(min/s), q ∈ [0, 2^b−1], x̂ = s·(q−Z), where the
range is first extended to include 0 (the authors' code omits this and then loses groups whose
values are all of one sign).
Rounding is to nearest, ties to even, as ONNX QuantizeLinear defines it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .integer_scales import choose_channel_scale, choose_multipliers
from .integers import IntegerRange, quantize, round_scale
from .schemes import LayerScheme, ScaleDtype


@dataclass(frozen=True)
class QuantizedWeight:
    """Integers and parameters of one weight matrix. G = K / group size.

    values: int8 (symmetric) or uint8 (asymmetric) [N, K], unpacked;
    scale: float32 [N, G], the factor of each group: rounded to the scheme's scale dtype, or with
    integer scales s·m, which float32 holds exactly (`integer_scales.py`);
    zero_point: uint8 [N, G], or None when symmetric;
    multiplier: m, uint8 [N, G] of 1 … 16, or None where the scales are floats.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    multiplier: Tensor | None = None

    @property
    def group_size(self) -> int:
        return self.values.shape[1] // self.scale.shape[1]

    @property
    def channel_scale(self) -> Tensor:
        """s [N, 1] in float32 as it is stored: s·m is exact, so dividing it by m is exact too."""
        if self.multiplier is None:
            raise ValueError("float scales have no scale a channel")
        return self.scale[:, :1] / self.multiplier[:, :1]

    def int8_values(self) -> Tensor:
        """q·m, int8 [N, K]: with `channel_scale` the whole weight, as an int8 product takes it."""
        if self.multiplier is None:
            raise ValueError("float scales do not make integers of a weight")
        n, k = self.values.shape
        grouped = self.values.reshape(n, -1, self.group_size)
        return (grouped * self.multiplier.to(torch.int8).unsqueeze(-1)).reshape(n, k)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """x̂ = s·(q−Z) as [N, K] of `dtype`, computed in float32 at least and rounded to it once."""
        n, k = self.values.shape
        wide = torch.promote_types(dtype, torch.float32)
        grouped = self.values.reshape(n, -1, self.group_size).to(wide)
        if self.zero_point is not None:
            grouped = grouped - self.zero_point.to(wide).unsqueeze(-1)
        return (grouped * self.scale.to(wide).unsqueeze(-1)).reshape(n, k).to(dtype)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        return self.with_each(lambda tensor: tensor.to(device))

    def with_each(self, change: Callable[[Tensor], Tensor]) -> QuantizedWeight:
        """The same weight with every tensor that it has changed by `change`."""
        changed = {name: change(tensor) for name, tensor in self.tensors().items()}
        return QuantizedWeight.of(changed, self.bits)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that it has, by field: what a store or a payload keeps."""
        found = {
            "values": self.values,
            "scale": self.scale,
            "zero_point": self.zero_point,
            "multiplier": self.multiplier,
        }
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], bits: int) -> QuantizedWeight:
        """The inverse of `tensors`."""
        return cls(
            tensors["values"],
            tensors["scale"],
            tensors.get("zero_point"),
            bits,
            tensors.get("multiplier"),
        )


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
    values: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    scheme: LayerScheme,
    channel: Tensor | None = None,
) -> QuantizedWeight:
    """Build a `QuantizedWeight` from float integers q [N, K], s [N, G] and Z [N, G]; with integer
    scales `channel` [N, 1] is what each s is a multiple of."""
    bits = scheme.weight_bits
    if not scheme.weight_symmetric:
        return QuantizedWeight(
            values.to(torch.uint8), scale.float(), zero_point.to(torch.uint8), bits
        )
    multiplier = None if channel is None else torch.round(scale / channel).to(torch.uint8)
    return QuantizedWeight(values.to(torch.int8), scale.float(), None, bits, multiplier)


def quantize_weight_nearest(weight: Tensor, scheme: LayerScheme) -> QuantizedWeight:
    """Round-to-nearest with the group's full range. weight [N, K], any float dtype.

    With integer scales a group gets one of the two multiples around that (`choose_multipliers`).
    """
    groups = _groups(weight, scheme)
    if scheme.has_integer_scales:
        return _quantize_by_integer_scales(groups, scheme, clipped=False)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    return quantize_groups(groups, low, high, scheme)


def _groups(weight: Tensor, scheme: LayerScheme) -> Tensor:
    n, k = weight.shape
    return weight.float().reshape(n, -1, scheme.weight_group_size(k))


def _quantize_by_integer_scales(
    groups: Tensor, scheme: LayerScheme, *, clipped: bool
) -> QuantizedWeight:
    """Round groups [N, G, g] to nearest under the integer scales of least squared error."""
    channel = choose_channel_scale(groups, scheme, clipped=clipped)
    scale = channel * choose_multipliers(groups, channel, scheme, clipped=clipped)
    zero_point = torch.zeros_like(scale)
    integers = IntegerRange.of(scheme.weight_bits, True)
    values = quantize(groups, scale.unsqueeze(-1), zero_point.unsqueeze(-1), integers).flatten(1)
    return pack_values(values, scale, zero_point, scheme, channel)


def quantize_groups(
    groups: Tensor, low: Tensor, high: Tensor, scheme: LayerScheme
) -> QuantizedWeight:
    """Quantize groups [N, G, g] with float scales for the ranges low, high [N, G, 1]."""
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
    is never above round-to-nearest's. With integer scales it tries every multiplier instead.
    weight [N, K].
    """
    groups = _groups(weight, scheme)
    if scheme.has_integer_scales:
        return _quantize_by_integer_scales(groups, scheme, clipped=True)
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
