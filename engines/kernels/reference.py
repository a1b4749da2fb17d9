"""What the kernels compute, in torch on a CPU: the meaning that they are tested against.

It reads and writes the very layouts of the kernels. Quantization is the simulation's own, to the
bit; products are exact in float64 and rounded once. Made for checking, not for speed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...calibrate.quantizers import quantize_activation
from ...calibrate.schemes import LayerScheme
from .layouts import from_panels, scale_order, to_panels
from .operands import Gate, Modulation, QuantizedRows
from .variants import LinearKind, QuantizeKind
from .weights import PackedWeight

_GELU = {"tanh": "tanh", "exact": "none"}


def quantize(x: Tensor, rows: QuantizedRows, modulation: Modulation | None) -> None:
    """Fill `rows` from x [M, K]."""
    kind, count = rows.kind, rows.count
    values, scale, zero = quantize_activation(_produced(x, kind, modulation), _scheme(kind))
    half = 1 << (kind.bits - 1) if kind.asymmetric else 0
    stored = (values.flatten(1) - half).to(torch.int8)
    rows.values.copy_(to_panels(stored, rows.rows))
    order = scale_order(rows.rows)[:count]
    groups = scale.shape[1]
    rows.scale[:groups, order] = scale.squeeze(-1).t()
    if rows.zero is not None:
        rows.zero[:groups, order] = (zero.squeeze(-1) - half).t()
    if rows.total is not None:
        width = rows.total.shape[0] * kind.sum_group
        whole = functional.pad(stored.float(), (0, width - kind.width))
        rows.total[:, order] = whole.unflatten(1, (-1, kind.sum_group)).sum(dim=2).t()


def _produced(x: Tensor, kind: QuantizeKind, modulation: Modulation | None) -> Tensor:
    """What is quantized, in float32: x, or what the fused producer makes of it."""
    wide = x.float()
    if modulation is not None:
        normal = functional.layer_norm(wide, wide.shape[-1:], eps=modulation.epsilon)
        spread = _by_row(1 + modulation.scale.float(), modulation.image_tokens, len(x))
        wide = normal * spread + _by_row(modulation.shift.float(), modulation.image_tokens, len(x))
    if kind.gelu is not None:
        wide = functional.gelu(wide, approximate=_GELU[kind.gelu])
    return wide


def _scheme(kind: QuantizeKind) -> LayerScheme:
    group: Any = "token" if kind.group == kind.width else kind.group
    return LayerScheme(
        weight_bits=8,
        activation_bits=kind.bits,
        activation_group=group,
        activation_symmetric=not kind.asymmetric,
    )


def _by_row(values: Tensor, image_tokens: int, count: int) -> Tensor:
    """[images, N] → [M, N]."""
    return values.repeat_interleave(image_tokens, dim=0)[:count]


def linear(
    rows: QuantizedRows,
    weight: PackedWeight,
    kind: LinearKind,
    bias: Tensor | None,
    gate: Gate | None,
    out: Tensor,
) -> None:
    """Fill `out` [M, N]."""
    y = dequantized_rows(rows) @ dequantized_weight(weight).t()
    if bias is not None:
        y += bias.double()
    if gate is not None:
        # the kernels round the product to the output's dtype before they gate it
        factor = _by_row(gate.gate.double(), gate.image_tokens, rows.count)
        y = gate.residual.double() + factor * y.to(out.dtype).double()
    out.copy_(y)


def weight_only(x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor) -> None:
    """Fill `out` [M, N] from 16-bit rows x [M, K]."""
    y = x.double() @ dequantized_weight(weight).t()
    out.copy_(y if bias is None else y + bias.double())


def dequantized_rows(rows: QuantizedRows) -> Tensor:
    """The rows' values, float64 [M, K]."""
    kind = rows.kind
    integers = from_panels(rows.values, rows.count, kind.width).double()
    order = scale_order(rows.rows)[: rows.count].to(integers.device)
    groups = kind.width // kind.group
    if rows.zero is not None:
        integers = integers - _by_column(rows.zero[:groups, order].double().t(), kind.group)
    return integers * _by_column(rows.scale[:groups, order].double().t(), kind.group)


def dequantized_weight(weight: PackedWeight) -> Tensor:
    """The weight's values, float64 [N, K]."""
    integers = weight.integers().double()
    groups = weight.groups
    size = weight.width // groups
    if weight.zero is not None:
        integers = integers - _by_column(weight.zero[:groups, : weight.channels].double().t(), size)
    scale = weight.scale[:groups, : weight.channels].double()
    if weight.multiplier is not None:
        scale = scale * weight.multiplier[:groups, : weight.channels].double()
    return integers * _by_column(scale.t(), size)


def _by_column(values: Tensor, size: int) -> Tensor:
    """[R, G] → [R, G · size]."""
    return values.repeat_interleave(size, dim=1)
