"""The operands of the integer products: packed weights, and rows quantized at run time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ...calibrate.quantizers import QuantizedWeight
from ...calibrate.schemes import LayerScheme
from ...errors import InputError
from .layouts import (
    CHANNEL_STEP,
    PANEL,
    ROW_STEP,
    padded,
    to_fragments,
    to_panels,
)
from .variants import LinearKind, QuantizeKind


@dataclass(frozen=True)
class PackedWeight:
    """A weight [N, K] as the kernels read it; N is padded to N', a multiple of 64.

    values: int8 panels [K/128, N', 128], or uint8 fragments [K/128, N'/64, 4096] at 4 bits;
    scale: float32 [G, N']: a group's scale, or with multipliers the channel's, G = 1;
    effective_scale: float32 [G, N'], scale · multiplier, which the weight-only kernel reads;
    multiplier: uint8 [G, N'] or None;
    zero: float32 [G, N'], the zero point less half the integers' range, or None;
    total: float32 [segments, N'], Σ (q − zero) of each segment, where inputs have zero points.
    """

    channels: int
    width: int
    values: Tensor
    scale: Tensor
    effective_scale: Tensor
    multiplier: Tensor | None = None
    zero: Tensor | None = None
    total: Tensor | None = None

    @property
    def rows(self) -> int:
        """N'."""
        return self.scale.shape[1]

    @property
    def byte_size(self) -> int:
        parts = (self.values, self.scale, self.effective_scale, self.multiplier, self.zero)
        held = {part.data_ptr(): part for part in (*parts, self.total) if part is not None}
        return sum(part.numel() * part.element_size() for part in held.values())

    def to(self, device: torch.device | str) -> PackedWeight:
        moved = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        if self.effective_scale is self.scale:
            moved["effective_scale"] = moved["scale"]
        return PackedWeight(**(vars(self) | moved))


def pack_weight(
    weights: Sequence[QuantizedWeight], scheme: LayerScheme, kind: LinearKind | None = None
) -> PackedWeight:
    """Stack the weights of linears that read the same input, in order, and lay them out.

    `kind` (`LinearKind.of(scheme, K)`) is left out for weight-only linears.
    """
    values = torch.cat([weight.values for weight in weights])
    scale = torch.cat([weight.scale for weight in weights])
    zero = _zeros(weights)
    bits = 4 if scheme.weight_bits <= 4 else 8
    half = 0 if scheme.weight_symmetric else 1 << (bits - 1)
    signed = (values.to(torch.int16) - half).to(torch.int8)
    channels, width = signed.shape
    laid = to_fragments(signed) if bits == 4 else to_panels(signed, CHANNEL_STEP)
    groups = padded(width, PANEL) * scale.shape[1] // width
    group_scale = _by_group(scale, groups)
    multiplier = getattr(weights[0], "multiplier", None)
    channel_scale = group_scale
    multipliers = None
    if multiplier is not None:
        multipliers = _by_group(torch.cat([w.multiplier for w in weights]), groups)
        channel_scale = _by_group(torch.cat([w.channel_scale for w in weights]), 1)
    total = None
    if kind is not None and kind.input_zero:
        centred = (
            signed.float()
            if zero is None
            else signed - zero.repeat_interleave(width // scale.shape[1], dim=1) + half
        )
        total = _by_group(_segment_sums(centred, kind.segment), kind.segments)
    return PackedWeight(
        channels,
        width,
        laid,
        channel_scale,
        group_scale,
        multipliers,
        None if zero is None else _by_group(zero - half, groups),
        total,
    )


def _zeros(weights: Sequence[QuantizedWeight]) -> Tensor | None:
    points = [weight.zero_point for weight in weights if weight.zero_point is not None]
    return torch.cat(points).float() if points else None


def _by_group(values: Tensor, groups: int) -> Tensor:
    """[N, G] → [G', N'], zero where there is no channel or group."""
    rows, count = values.shape
    grown = functional.pad(values, (0, groups - count, 0, padded(rows, CHANNEL_STEP) - rows))
    return grown.t().contiguous()


def _segment_sums(values: Tensor, segment: int) -> Tensor:
    whole = functional.pad(values, (0, padded(values.shape[1], segment) - values.shape[1]))
    return whole.unflatten(1, (-1, segment)).sum(dim=2)


@dataclass(frozen=True)
class QuantizedRows:
    """Rows [M, K] quantized at run time; M is padded to M', a multiple of 8.

    values: int8 panels [K/128, M', 128]; scale: float32 [G, M']; zero (asymmetric): float32
    [G, M'], less half the range; total (for weight zero points): float32 [segments, M'].
    What lies in padding rows is undefined.
    """

    count: int
    kind: QuantizeKind
    values: Tensor
    scale: Tensor
    zero: Tensor | None
    total: Tensor | None

    @property
    def rows(self) -> int:
        """M'."""
        return self.scale.shape[1]

    @classmethod
    def empty(cls, count: int, kind: QuantizeKind, device: torch.device) -> QuantizedRows:
        """Room for `count` rows."""
        if count < 1:
            raise InputError(f"a product needs at least one row, got {count}")
        rows = padded(count, ROW_STEP)
        width = kind.panels * PANEL
        groups = -(-width // kind.group)
        # groups of padding are multiplied by zeros, and must be numbers for that
        make = torch.empty if kind.width == width else torch.zeros
        scale = make(groups, rows, device=device)
        return cls(
            count,
            kind,
            torch.empty(kind.panels, rows, PANEL, dtype=torch.int8, device=device),
            scale,
            torch.zeros_like(scale) if kind.asymmetric else None,
            torch.empty(-(-width // kind.sum_group), rows, device=device)
            if kind.sum_group
            else None,
        )
