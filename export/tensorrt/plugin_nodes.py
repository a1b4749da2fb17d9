"""The contract between a `tensorrt-plugin` file and the plugins that run it: names and operands.

A node's inputs are its kernel's pointers in their order, its outputs the pointers that follow the
kernel's integers: TensorRT passes inputs, then integers, then outputs, and nothing else
(docs/tensorrt.md). A plugin cannot be given a null pointer, so what a kernel does not read is
filled with a tensor that is at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from ...calibrate.schemes import LayerScheme
from ..contents import LinearContents
from ..opsets import QDIT_DOMAIN

NAMESPACE = QDIT_DOMAIN  # of the plugins; the functions' domain is called the same
PLUGIN_VERSION = "1"
KIND = "kind"  # the attribute that the plugins read: one, so that no order of attributes matters


@dataclass(frozen=True)
class RowsVariant:
    """Which function and plugin quantizes rows."""

    asymmetric: bool = False
    sums: bool = False

    @property
    def name(self) -> str:
        suffix = ("Asymmetric" if self.asymmetric else "") + ("Sums" if self.sums else "")
        return f"GroupQuantRows{suffix}"


@dataclass(frozen=True)
class ProductVariant:
    """Which function and plugin multiplies. bits: 4 or 8, of the packed weights."""

    bits: int
    multipliers: bool = False
    weight_zero: bool = False
    input_zero: bool = False

    @property
    def name(self) -> str:
        flags = (
            ("Multipliers", self.multipliers),
            ("WeightZero", self.weight_zero),
            ("InputZero", self.input_zero),
        )
        return f"GroupQuantLinearW{self.bits}" + "".join(word for word, on in flags if on)


@dataclass(frozen=True)
class WeightOnlyVariant:
    """Which function and plugin multiplies 16-bit rows. bits: 4 or 8, of the packed weights."""

    bits: int
    weight_zero: bool = False

    @property
    def name(self) -> str:
        return f"GroupQuantWeightOnlyW{self.bits}" + ("WeightZero" if self.weight_zero else "")


Variant = RowsVariant | ProductVariant | WeightOnlyVariant

ALL_VARIANTS: tuple[Variant, ...] = (
    *(RowsVariant(a, s) for a in (False, True) for s in (False, True)),
    *(
        ProductVariant(bits, False, weight_zero, input_zero)
        for bits in (4, 8)
        for weight_zero in (False, True)
        for input_zero in (False, True)
    ),
    ProductVariant(4, True),
    ProductVariant(4, True, False, True),
    *(WeightOnlyVariant(bits, zero) for bits in (4, 8) for zero in (False, True)),
)


@dataclass(frozen=True)
class Operand:
    """A packed tensor of a linear: INT8 or FLOAT, made by `load()` as the file is written."""

    dtype: ir.DataType
    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]


@dataclass(frozen=True)
class RowsLayout:
    """What quantized rows [M, K] are: values [panels, M', 128], scales [groups, M'].

    sums: rows of segment sums, 0 for none; kind: the plugin's attribute.
    """

    kind: str
    variant: RowsVariant
    panels: int
    groups: int
    sums: int
    segment: int  # channels of one sum


@dataclass(frozen=True)
class ProductOperands:
    """A linear's packed weight for an integer product; None where the variant reads nothing."""

    kind: str
    variant: ProductVariant
    weight: Operand
    scale: Operand
    zero: Operand | None
    total: Operand | None
    multiplier: Operand | None


@dataclass(frozen=True)
class WeightOnlyOperands:
    """A linear's packed weight for a product with 16-bit rows."""

    kind: str
    variant: WeightOnlyVariant
    weight: Operand
    scale: Operand
    zero: Operand | None


class KernelPacking(Protocol):
    """What the kernels' packing tells the lowering (`engines/tensorrt/plugin/packing.py`).

    It is handed in because this floor may not import the kernels' one.
    """

    def rows(self, scheme: LayerScheme, in_features: int) -> RowsLayout:
        """How rows are quantized for a scheme."""

    def product(self, contents: LinearContents) -> ProductOperands:
        """The operands of a linear whose activations are quantized."""

    def weight_only(self, contents: LinearContents) -> WeightOnlyOperands:
        """The operands of a linear whose activations are not."""
