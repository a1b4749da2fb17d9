"""Weights as the kernels read them, packed once from a checkpoint's integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...calibrate.quantizers import QuantizedWeight
from ...calibrate.schemes import LayerScheme
from .layouts import (
    CHANNEL_STEP,
    PANEL,
    from_fragments,
    from_panels,
    padded,
    to_fragments,
    to_panels,
)
from .variants import LinearKind

_LEAST_START = 31 * 255 * 255 + 241 * 241  # kStart of the kernel, where it is the smaller one


@dataclass(frozen=True)
class PackedWeight:
    """A weight [N, K] as the kernels read it; N is padded to N', a multiple of 64.

    values: int8 panels [K/128, N', 128], or uint8 fragments [K/128, N'/64, 4096] at 4 bits;
    scale: float32 [G, N']: a group's scale, or with multipliers the channel's, [1, N'];
    multiplier: uint8 [G, N'], or None (weight-only products take the groups' own scales);
    zero: float32 [G, N'], the zero point less half the integers' range, or None;
    total: float32 [segments, N'], Σ (q − zero) of each segment, where inputs have zero points;
    heavy: Σ |q| of some 128 k is so near its most that sums cannot start from a constant
    (`Tile.starts`), as where nearly all of them are the most negative integer.
    """

    channels: int
    width: int
    groups: int  # of the unpadded width
    values: Tensor
    scale: Tensor
    multiplier: Tensor | None = None
    zero: Tensor | None = None
    total: Tensor | None = None
    heavy: bool = False

    @property
    def rows(self) -> int:
        """N'."""
        return self.scale.shape[1]

    @property
    def byte_size(self) -> int:
        parts = (self.values, self.scale, self.multiplier, self.zero, self.total)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    @property
    def bits(self) -> int:
        """4 or 8: of the container, whatever the scheme's bits."""
        return 4 if self.values.dtype == torch.uint8 else 8

    def integers(self) -> Tensor:
        """q as it was packed, int8 [N, K]: asymmetric ones less half their range."""
        unpack = from_fragments if self.bits == 4 else from_panels
        return unpack(self.values, self.channels, self.width)

    def to(self, device: torch.device | str) -> PackedWeight:
        """A copy on `device`."""
        return PackedWeight(**{name: _moved(value, device) for name, value in vars(self).items()})


def _moved(value: Any, device: torch.device | str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def pack_weight(
    weights: Sequence[QuantizedWeight], scheme: LayerScheme, kind: LinearKind | None = None
) -> PackedWeight:
    """Stack the weights of linears that read the same input, in order, and lay them out.

    `kind` (`LinearKind.of(scheme, K)`) is left out for weight-only linears.
    """
    bits = 4 if scheme.weight_bits <= 4 else 8
    half = 0 if scheme.weight_symmetric else 1 << (bits - 1)
    values = torch.cat([weight.values for weight in weights])
    signed = (values.to(torch.int16) - half).to(torch.int8)
    zero = None
    if not scheme.weight_symmetric:
        zero = _stacked([weight.zero_point for weight in weights]).float() - half
    scale = _by_group(_stacked([weight.scale for weight in weights]), signed)
    multiplier = None
    if kind is not None and kind.multiplier_group is not None:
        multiplier = _by_group(_stacked([weight.multiplier for weight in weights]), signed)
        scale = _padded_channels(_stacked([weight.channel_scale for weight in weights])).t()
    return PackedWeight(
        channels=signed.shape[0],
        width=signed.shape[1],
        groups=weights[0].scale.shape[1],
        values=to_fragments(signed) if bits == 4 else to_panels(signed, CHANNEL_STEP),
        scale=scale.contiguous(),
        multiplier=multiplier,
        zero=None if zero is None else _by_group(zero, signed),
        total=None if kind is None or not kind.input_zero else _totals(signed, zero, kind),
        heavy=_is_heavy(signed, bits),
    )


def _is_heavy(signed: Tensor, bits: int) -> bool:
    if signed.is_meta:
        return False
    magnitudes = functional.pad(signed.to(torch.int32).abs(), (0, -signed.shape[1] % PANEL))
    unit = 16 if bits == 4 else 1  # as the kernel multiplies them
    return 127 * unit * int(magnitudes.unflatten(1, (-1, PANEL)).sum(dim=2).max()) > _LEAST_START


def _stacked(parts: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([part for part in parts if part is not None])


def _by_group(values: Tensor, signed: Tensor) -> Tensor:
    """[N, G] → [G', N']: one row a group of the padded width, zero where there is none."""
    width = signed.shape[1]
    groups = -(-padded(width, PANEL) * values.shape[1] // width)
    grown = functional.pad(values, (0, groups - values.shape[1]))
    return _padded_channels(grown).t().contiguous()


def _padded_channels(values: Tensor) -> Tensor:
    channels = values.shape[0]
    return functional.pad(values, (0, 0, 0, padded(channels, CHANNEL_STEP) - channels))


def _totals(signed: Tensor, zero: Tensor | None, kind: LinearKind) -> Tensor:
    """Σ (q − zero) of each segment, float32 [segments, N']."""
    centred = signed.float()
    if zero is not None:
        centred = centred - zero.repeat_interleave(kind.width // zero.shape[1], dim=1)
    whole = functional.pad(centred, (0, kind.segments * kind.segment - kind.width))
    sums = whole.unflatten(1, (-1, kind.segment)).sum(dim=2)
    return _padded_channels(sums).t().contiguous()
