"""What a set of linears reads: rows in 16 bits, or quantized on the way from what makes them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels.operands import Modulation, QuantizedRows
from ..kernels.rows import quantize_rows
from ..kernels.variants import Gelu, QuantizeKind


@dataclass
class Source:
    """Rows x [M, K] and their producer: adaLN's normalization and modulation, or GELU.

    Quantized rows come from one kernel with the producer inside; each kind is made once. Linears
    that stay in 16 bits read `value`, which torch makes.
    """

    x: Tensor
    modulation: Modulation | None = None
    gelu: Gelu | None = None
    _rows: dict[QuantizeKind, QuantizedRows] = field(default_factory=dict)
    _value: Tensor | None = None

    def rows(self, kind: QuantizeKind) -> QuantizedRows:
        """Quantized as `kind` says; what it says of the producer is replaced by this one's."""
        own = replace(kind, normalized=self.modulation is not None, gelu=self.gelu)
        if own not in self._rows:
            self._rows[own] = quantize_rows(self.x, own, self.modulation)
        return self._rows[own]

    @property
    def value(self) -> Tensor:
        """The rows in 16 bits, after the producer."""
        if self._value is None:
            self._value = self._produced()
        return self._value

    def _produced(self) -> Tensor:
        x = self.x
        if self.modulation is not None:
            x = _modulated(x, self.modulation)
        if self.gelu is not None:
            x = functional.gelu(x, approximate="tanh" if self.gelu == "tanh" else "none")
        return x


def _modulated(x: Tensor, modulation: Modulation) -> Tensor:
    images = x.unflatten(0, (-1, modulation.image_tokens))
    normal = functional.layer_norm(images, images.shape[-1:], eps=modulation.epsilon)
    scale, shift = modulation.scale.unsqueeze(1), modulation.shift.unsqueeze(1)
    return torch.addcmul(shift, normal, 1 + scale).flatten(0, 1)
