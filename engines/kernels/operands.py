"""What the kernels read besides plain tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from .layouts import PANEL, ROW_STEP, padded
from .variants import QuantizeKind


@dataclass(frozen=True)
class QuantizedRows:
    """Rows [M, K] quantized at run time; M is padded to M', a multiple of 16.

    values: int8 panels [K/128, M', 128]; scale: float32 [G, M']; zero (asymmetric): float32
    [G, M'], less half the range; total (for weight zero points): float32 [segments, M']. The last
    three have sixteen rows each in `layouts.scale_order`. What lies in padding rows is undefined.
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
        total = None
        if kind.sum_group:
            total = torch.empty(-(-width // kind.sum_group), rows, device=device)
        return cls(
            count,
            kind,
            torch.empty(kind.panels, rows, PANEL, dtype=torch.int8, device=device),
            scale,
            torch.zeros_like(scale) if kind.asymmetric else None,
            total,
        )


@dataclass(frozen=True)
class Modulation:
    """adaLN's shift and scale [images, K], views of one tensor, and what a row's image is.

    image_tokens: consecutive rows of one image; epsilon: of the normalization.
    """

    shift: Tensor
    scale: Tensor
    image_tokens: int
    epsilon: float


@dataclass(frozen=True)
class Gate:
    """y = residual + gate · product: residual [M, N], gate [images, N].

    image_tokens: consecutive rows of one image.
    """

    residual: Tensor
    gate: Tensor
    image_tokens: int
