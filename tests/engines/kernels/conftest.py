"""Products as the tests of the kernels make them, and what they are compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qdit.calibrate.quantizers import (
    QuantizedWeight,
    quantize_activation,
    quantize_weight_nearest,
)
from qdit.calibrate.schemes import LayerScheme
from qdit.engines.kernels.variants import LinearKind, QuantizeKind
from qdit.engines.kernels.weights import PackedWeight, pack_weight


@dataclass(frozen=True)
class FakeGpu:
    """The facts of a GPU that is not there (`tuning.TunedGpu`)."""

    name: str = "Test GPU 9000 80GB"
    architecture: str = "sm_90a"
    hopper: bool = True
    shared_bytes: int = 227 << 10
    multiprocessors: int = 132
    index: int = 0


@dataclass(frozen=True)
class Problem:
    """One product: rows x [M, K], a quantized weight [N, K], a bias [N], and its scheme."""

    scheme: LayerScheme
    x: Tensor
    weight: QuantizedWeight
    bias: Tensor

    @property
    def kind(self) -> LinearKind:
        return LinearKind.of(self.scheme, self.x.shape[1])

    @property
    def rows_kind(self) -> QuantizeKind:
        return QuantizeKind.of(self.scheme, self.x.shape[1])

    @property
    def packed(self) -> PackedWeight:
        return pack_weight([self.weight], self.scheme, self.kind)

    def expected(self) -> tuple[Tensor, Tensor]:
        """y [M, N] in float64 by the simulation's own quantizers, and Σ |x̂| |ŵ| + |bias|."""
        values, scale, zero = quantize_activation(self.x, self.scheme)
        rows = ((values.double() - zero.double()) * scale.double()).reshape(self.x.shape)
        weight, bias = self.weight.dequantize(torch.float64), self.bias.double()
        return rows @ weight.t() + bias, rows.abs() @ weight.abs().t() + bias.abs()


def make_problem(
    scheme: LayerScheme,
    count: int,
    width: int,
    channels: int,
    *,
    dtype: torch.dtype = torch.float16,
    device: str = "cpu",
    seed: int = 0,
) -> Problem:
    """Normal numbers; the inputs' columns vary by an order of magnitude, as a DiT's do."""
    random = torch.Generator().manual_seed(seed)
    spread = torch.rand(1, width, generator=random) * 3
    x = (torch.randn(count, width, generator=random) * spread).to(dtype)
    weight = quantize_weight_nearest(torch.randn(channels, width, generator=random) * 0.05, scheme)
    bias = torch.randn(channels, generator=random).to(dtype)
    return Problem(scheme, x.to(device), weight.to(device), bias.to(device))


def output_bound(expected: Tensor, magnitude: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    """What rounding allows: once to the output's dtype, and one float32 addition a segment of 32 k
    and for scales and bias, each relative to the sum of magnitudes so far."""
    half_step = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    smallest = torch.finfo(dtype).tiny
    rounding = half_step * expected.abs().clamp(min=smallest)
    return 1.01 * rounding + magnitude * 2.0**-24 * (width / 32 + 8)


SCHEMES = {
    "w8 g128": LayerScheme(8, 8, 128, 128),
    "w4 g128": LayerScheme(4, 8, 128, 128),
    "w4 g32": LayerScheme(4, 8, 32, 32),
    "w8 g32": LayerScheme(8, 8, 32, 32),
    "w4 g64": LayerScheme(4, 8, 64, 64),
    "w8 g96": LayerScheme(8, 8, 96, 96),
    "w4 g96": LayerScheme(4, 8, 96, 96),
    "w4 g192": LayerScheme(4, 8, 192, 192),
    "w4 g288 a192": LayerScheme(4, 8, 288, 192),
    "w8 g384 a128": LayerScheme(8, 8, 384, 128),
    "w4 channel a128": LayerScheme(4, 8, "channel", 128),
    "w4 g128 token": LayerScheme(4, 8, 128, "token"),
    "w8 channel token": LayerScheme(8, 8, "channel", "token"),
    "w4 g1152 a1152": LayerScheme(4, 8, 1152, 1152),
    "w4 g128 integer token": LayerScheme(4, 8, 128, "token", scale_format="integer"),
    "w4 g64 integer a128": LayerScheme(4, 8, 64, 128, scale_format="integer"),
    "w4 g96 integer token": LayerScheme(4, 8, 96, "token", scale_format="integer"),
    "w4 g64 float32 scales": LayerScheme(4, 8, 64, 64, scale_dtype="float32"),
    "w4 asymmetric g64": LayerScheme(4, 8, 64, 64, weight_symmetric=False),
    "w8 asymmetric g64 a128": LayerScheme(8, 8, 64, 128, False, False),
    "w4 symmetric a64 asymmetric": LayerScheme(4, 8, 64, 64, True, False),
    "w4 asymmetric channel token": LayerScheme(4, 8, "channel", "token", False, False),
    "w3 g128": LayerScheme(3, 8, 128, 128),
    "w6 g128": LayerScheme(6, 8, 128, 128),
    "w4a4 g64": LayerScheme(4, 4, 64, 64),
    "w4a6 token": LayerScheme(4, 6, 128, "token"),
}
