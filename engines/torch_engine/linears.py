"""A checkpoint's linears on the kernels. Linears of one input and one scheme are one product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...calibrate.plan import LinearSpec, QuantizationPlan
from ...calibrate.quantizers import QuantizedWeight
from ...calibrate.schemes import LayerScheme
from ...errors import InputError
from ..kernels.operands import Gate
from ..kernels.product import linear
from ..kernels.variants import LinearKind, QuantizeKind, WeightOnlyKind
from ..kernels.weight_only import weight_only_linear
from ..kernels.weights import PackedWeight, pack_weight
from .source import Source


class Part(nn.Module):
    """Linears of one input and one scheme, side by side: [M, K] → [M, Σ N]."""

    bias: Tensor | None

    def __init__(self, specs: Sequence[LinearSpec], bias: Tensor | None) -> None:
        super().__init__()
        self.specs = tuple(specs)
        self.register_buffer("bias", bias, persistent=False)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weight; 0 where it is an ordinary buffer."""
        return 0

    def forward(self, source: Source, gate: Gate | None, dtype: torch.dtype) -> Tensor:
        """The products, gated into a residual if one is given."""
        raise NotImplementedError


class PackedPart(Part):
    """A part whose weight is packed for a kernel."""

    def __init__(
        self, specs: Sequence[LinearSpec], weight: PackedWeight, bias: Tensor | None
    ) -> None:
        super().__init__(specs, bias)
        self.weight = weight

    @property
    def packed_bytes(self) -> int:
        return self.weight.byte_size


class IntegerPart(PackedPart):
    """Both sides quantized: an integer product."""

    def __init__(
        self,
        specs: Sequence[LinearSpec],
        scheme: LayerScheme,
        quantized: Sequence[QuantizedWeight],
        bias: Tensor | None,
    ) -> None:
        self.kind = LinearKind.of(scheme, specs[0].in_features)
        self.rows_kind = QuantizeKind.of(scheme, specs[0].in_features)
        super().__init__(specs, pack_weight(quantized, scheme, self.kind), bias)

    def forward(self, source: Source, gate: Gate | None, dtype: torch.dtype) -> Tensor:
        rows = source.rows(self.rows_kind)
        return linear(rows, self.weight, self.kind, bias=self.bias, dtype=dtype, gate=gate)


class WeightOnlyPart(PackedPart):
    """Quantized weights, 16-bit rows."""

    def __init__(
        self,
        specs: Sequence[LinearSpec],
        scheme: LayerScheme,
        quantized: Sequence[QuantizedWeight],
        bias: Tensor | None,
    ) -> None:
        self.kind = WeightOnlyKind.of(scheme, specs[0].in_features)
        super().__init__(specs, pack_weight(quantized, scheme), bias)

    def forward(self, source: Source, gate: Gate | None, dtype: torch.dtype) -> Tensor:
        return gated(weight_only_linear(source.value, self.weight, self.kind, self.bias), gate)


class PlainPart(Part):
    """Left at 16 bits."""

    weight: Tensor

    def __init__(self, specs: Sequence[LinearSpec], weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(specs, bias)
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, source: Source, gate: Gate | None, dtype: torch.dtype) -> Tensor:
        return gated(functional.linear(source.value, self.weight, self.bias), gate)


def gated(y: Tensor, gate: Gate | None) -> Tensor:
    """residual + gate · y, image by image."""
    if gate is None:
        return y
    images = y.unflatten(0, (-1, gate.image_tokens))
    residual = gate.residual.unflatten(0, (-1, gate.image_tokens))
    return torch.addcmul(residual, gate.gate.unsqueeze(1), images).flatten(0, 1)


def quantized_part(
    specs: Sequence[LinearSpec],
    scheme: LayerScheme,
    quantized: Sequence[QuantizedWeight],
    bias: Tensor | None,
) -> Part:
    """The part of a scheme that quantizes weights. Raises `InputError` where no kernel does."""
    part = IntegerPart if scheme.quantizes_activations else WeightOnlyPart
    return part(specs, scheme, quantized, bias)


def refuse_kernels(spec: LinearSpec, scheme: LayerScheme) -> str | None:
    """Why no kernel computes a layer's scheme, or None."""
    if not scheme.quantizes_weights:
        return None
    kind = LinearKind if scheme.quantizes_activations else WeightOnlyKind
    try:
        kind.of(scheme, spec.in_features)
    except InputError as error:
        return str(error)
    return None


class Linears(nn.Module):
    """All linears that read one input, in model order."""

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, source: Source, dtype: torch.dtype) -> list[Tensor]:
        """Each linear's output [M, N]: views of one tensor where linears share a product."""
        outputs: list[Tensor] = []
        for part in self._parts():
            made = part(source, None, dtype)
            outputs += made.split([spec.out_features for spec in part.specs], dim=1)
        return outputs

    def gate_into(self, source: Source, gate: Gate, dtype: torch.dtype) -> Tensor:
        """residual + gate · the one linear's output."""
        (part,) = self._parts()
        gated_sum: Tensor = part(source, gate, dtype)
        return gated_sum

    def _parts(self) -> list[Part]:
        return [part for part in self.parts if isinstance(part, Part)]


def products_of(
    specs: Sequence[LinearSpec], plan: QuantizationPlan
) -> list[tuple[LayerScheme, list[LinearSpec]]]:
    """Which linears of one input become one product: neighbours of one scheme."""
    runs = groupby(specs, key=lambda spec: plan[spec.name])
    return [(scheme, list(own)) for scheme, own in runs]


class LinearBuilder:
    """Builds `Linears` from a checkpoint's plan, packed weights and 16-bit parameters."""

    def __init__(
        self,
        plan: QuantizationPlan,
        weights: Mapping[str, QuantizedWeight],
        skeleton: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._plan = plan
        self._weights = weights
        self._skeleton = skeleton
        self._device = device
        self._dtype = dtype

    def build(self, specs: Sequence[LinearSpec]) -> Linears:
        """Neighbours of one scheme become one product. Raises `InputError` for a layer that no
        kernel computes."""
        return Linears([self._part(own, scheme) for scheme, own in products_of(specs, self._plan)])

    def _part(self, specs: list[LinearSpec], scheme: LayerScheme) -> Part:
        bias = self._bias(specs)
        if not scheme.quantizes_weights:
            weights = [self._parameter(f"{spec.name}.weight") for spec in specs]
            return PlainPart(specs, torch.cat(weights), bias)
        quantized = [self._weights[spec.name].to(self._device) for spec in specs]
        try:
            return quantized_part(specs, scheme, quantized, bias)
        except InputError as error:
            raise InputError(f"the torch engine cannot run {specs[0].name}: {error}") from error

    def _bias(self, specs: list[LinearSpec]) -> Tensor | None:
        """All biases in a row; linears without one add zeros, where any of them has one."""
        if not any(spec.has_bias for spec in specs):
            return None
        parts = [
            self._parameter(f"{spec.name}.bias")
            if spec.has_bias
            else torch.zeros(spec.out_features, dtype=self._dtype, device=self._device)
            for spec in specs
        ]
        return torch.cat(parts)

    def _parameter(self, name: str) -> Tensor:
        return self._skeleton.get_parameter(name).detach().to(self._device, self._dtype)
