"""Simulation of quantized linears in torch: the meaning that every exported target must match."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .quantizers import QuantizedWeight, fake_quantize_activation
from .schemes import LayerScheme


class QuantizedLinear(nn.Module):
    """y = Q_a(x) Ŵᵀ + b with dynamic group-wise Q_a. Input [..., K] → [..., N].

    The integers stay available as `quantized`; `weight` is the dequantized matrix Ŵ [N, K] in
    `dtype`, and `.to(dtype)` and `.to(device)` work as for `nn.Linear`.
    Ŵ is computed in float32 (float64 for float64) and rounded to `dtype` once. It is kept, or with
    `keep_weight=False` made anew by every call: a quarter of the memory, and some time a call.
    """

    _weight: Tensor | None
    _like: Tensor

    def __init__(
        self,
        scheme: LayerScheme,
        quantized: QuantizedWeight,
        bias: Tensor | None,
        dtype: torch.dtype = torch.float32,
        *,
        keep_weight: bool = True,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.quantized = quantized
        # an empty buffer follows `.to()`, so that a weight which is not kept knows its dtype
        self.register_buffer("_like", quantized.scale.new_empty(0, dtype=dtype), persistent=False)
        kept = self._dequantized() if keep_weight else None
        self.register_buffer("_weight", kept, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def _dequantized(self) -> Tensor:
        wide = torch.float64 if self._like.dtype == torch.float64 else torch.float32
        return self.quantized.dequantize(wide).to(self._like)

    @property
    def weight(self) -> Tensor:
        """Ŵ [N, K] in the compute dtype."""
        return self._dequantized() if self._weight is None else self._weight

    @property
    def in_features(self) -> int:
        return self.quantized.values.shape[1]

    @property
    def out_features(self) -> int:
        return self.quantized.values.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(fake_quantize_activation(x, self.scheme), self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, {self.scheme.label}"


class QuantizedInputLinear(nn.Module):
    """A linear whose weight is still full precision but whose input is already quantized.

    Calibration runs on it: GPTQ's Hessian must see the inputs that the quantized layer will see.
    """

    def __init__(self, scheme: LayerScheme, linear: nn.Linear) -> None:
        super().__init__()
        self.scheme = scheme
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(fake_quantize_activation(x, self.scheme))


def replace_linear(denoiser: nn.Module, name: str, replacement: nn.Module) -> None:
    """Put `replacement` at path `name` of the denoiser."""
    parent, _, child = name.rpartition(".")
    setattr(denoiser.get_submodule(parent), child, replacement)


def install_quantized_linears(
    denoiser: nn.Module,
    schemes: Mapping[str, LayerScheme],
    weights: Mapping[str, QuantizedWeight],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    keep_weights: bool = True,
) -> None:
    """Replace every linear that has quantized weights by its simulation, in place.

    `device` and `dtype` are the replaced linear's own by default; one whose weight is on the meta
    device takes the device of its quantized weights. `weights` is asked for one weight at a time.
    `keep_weights` as `QuantizedLinear` has it.
    """
    for name in weights:
        linear: Any = denoiser.get_submodule(name)  # nn.Linear or one of the classes above
        if isinstance(linear, QuantizedInputLinear):
            linear = linear.linear
        old: Tensor = linear.weight
        quantized = weights[name]
        target = device or (quantized.values.device if old.is_meta else old.device)
        replacement = QuantizedLinear(
            schemes[name],
            quantized.to(target),
            linear.bias,
            dtype or old.dtype,
            keep_weight=keep_weights,
        )
        replace_linear(denoiser, name, replacement)


def output_dtype(denoiser: nn.Module) -> torch.dtype:
    """The dtype of the denoiser's floating-point parameters."""
    return next(p.dtype for p in denoiser.parameters() if p.is_floating_point())
