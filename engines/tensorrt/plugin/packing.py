"""The kernels' packing, as `export/tensorrt/lower_plugin.py` asks for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache, partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ....calibrate.quantizers import QuantizedWeight
from ....calibrate.schemes import LayerScheme
from ....export.contents import LinearContents
from ....export.tensorrt.plugin_nodes import (
    Operand,
    ProductOperands,
    ProductVariant,
    RowsLayout,
    RowsVariant,
    WeightOnlyOperands,
    WeightOnlyVariant,
)
from ...kernels.layouts import PANEL
from ...kernels.variants import LinearKind, QuantizeKind, WeightOnlyKind
from ...kernels.weights import PackedWeight, pack_weight

Kind = LinearKind | QuantizeKind | WeightOnlyKind


class Packing:
    """`KernelPacking` over `engines/kernels/weights.py`.

    A linear is packed when one of its tensors is written; the last packed linear is kept, since its
    tensors are written one after the other.
    """

    def __init__(self) -> None:
        self._pack = lru_cache(maxsize=1)(_packed)

    def rows(self, scheme: LayerScheme, in_features: int) -> RowsLayout:
        kind = QuantizeKind.of(scheme, in_features)
        width = kind.panels * PANEL
        return RowsLayout(
            kind=kind_text(kind),
            variant=RowsVariant(kind.asymmetric, kind.sum_group > 0),
            panels=kind.panels,
            groups=-(-width // kind.group),
            sums=-(-width // kind.sum_group) if kind.sum_group else 0,
            segment=kind.sum_group,
        )

    def product(self, contents: LinearContents) -> ProductOperands:
        kind = LinearKind.of(contents.scheme, contents.spec.in_features)
        outline = _outline(contents, kind)
        read = partial(self._operand, contents, kind, outline)
        return ProductOperands(
            kind=kind_text(kind),
            variant=ProductVariant(
                kind.weight_bits,
                kind.multiplier_group is not None,
                kind.weight_zero,
                kind.input_zero,
            ),
            weight=_some(read("values")),
            scale=_some(read("scale")),
            zero=read("zero"),
            total=read("total"),
            multiplier=read("multiplier"),
        )

    def weight_only(self, contents: LinearContents) -> WeightOnlyOperands:
        kind = WeightOnlyKind.of(contents.scheme, contents.spec.in_features)
        outline = _outline(contents, None)
        read = partial(self._operand, contents, None, outline)
        return WeightOnlyOperands(
            kind=kind_text(kind),
            variant=WeightOnlyVariant(kind.weight_bits, kind.weight_zero),
            weight=_some(read("values")),
            scale=_some(read("scale")),
            zero=read("zero"),
        )

    def _operand(
        self, contents: LinearContents, kind: LinearKind | None, outline: PackedWeight, field: str
    ) -> Operand | None:
        shape: Tensor | None = getattr(outline, field)
        if shape is None:
            return None
        dtype = ir.DataType.FLOAT if shape.dtype == torch.float32 else ir.DataType.INT8

        def load() -> np.ndarray:
            packed = self._pack(contents.quantized, contents.scheme, kind)
            return _array(getattr(packed, field))

        return Operand(dtype, tuple(shape.shape), load)


def kind_text(kind: Kind) -> str:
    """A kind as a plugin's attribute: JSON of its fields."""
    return json.dumps(asdict(kind), sort_keys=True)


def kind_from_text(cls: type[Any], text: str) -> Any:
    """The inverse of `kind_text`."""
    return cls(**json.loads(text))


def _packed(
    load: Callable[[], QuantizedWeight], scheme: LayerScheme, kind: LinearKind | None
) -> PackedWeight:
    return pack_weight([load()], scheme, kind)


def _outline(contents: LinearContents, kind: LinearKind | None) -> PackedWeight:
    """Every tensor's shape and dtype, by packing a weight that has no values."""
    spec, scheme = contents.spec, contents.scheme
    n, k = spec.out_features, spec.in_features
    groups = k // scheme.weight_group_size(k)
    symmetric = scheme.weight_symmetric
    empty = QuantizedWeight(
        torch.empty(n, k, dtype=torch.int8 if symmetric else torch.uint8, device="meta"),
        torch.empty(n, groups, device="meta"),
        None if symmetric else torch.empty(n, groups, dtype=torch.uint8, device="meta"),
        scheme.weight_bits,
        torch.empty(n, groups, dtype=torch.uint8, device="meta")
        if scheme.has_integer_scales
        else None,
    )
    return pack_weight([empty], scheme, kind)


def _array(value: Tensor) -> np.ndarray:
    """TensorRT has no UINT8 constants: packed nibbles and multipliers travel as INT8."""
    signed = value.view(torch.int8) if value.dtype == torch.uint8 else value
    return np.asarray(signed.contiguous().numpy())


def _some(operand: Operand | None) -> Operand:
    if operand is None:
        raise ValueError("a packed weight always has values and scales")
    return operand
