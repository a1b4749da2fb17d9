"""Lower linears to plugin nodes with a function body each: the `tensorrt-plugin` target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir

from ...errors import InputError
from ..contents import LinearContents
from ..opsets import QDIT_DOMAIN, ComputeDtype
from ..passes.lower_qdq import LinearLowering
from .lower_int8 import PRECISION
from .plugin_functions import PANEL, function_of
from .plugin_nodes import (
    KIND,
    NAMESPACE,
    PLUGIN_VERSION,
    KernelPacking,
    Operand,
    RowsLayout,
    Variant,
)

_FLOAT, _HALF, _INT8 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT8
_Dims = list[int | ir.SymbolicDim]
_Output = tuple[str, ir.DataType, _Dims]


class LowerPluginPass(ir.passes.InPlacePass):
    """Replace every `qdit::GroupQuantLinear(layer)` by the nodes of qdit's plugins.

    Requires: contents for every layer; a float16 model, which the kernels' outputs are; schemes
    that the kernels have (`packing` raises `InputError` for others). Ensures: nodes of domain
    'qdit' are plugin nodes, each a function of the model as well; 'qdit.linears' with 'precision'
    ('PLUGIN' or 'FP16'). Cases:

    1. Quantized activations: rows are quantized by one node (`GroupQuantRows…`), once for linears
       that read one value with equal schemes, and multiplied by another (`GroupQuantLinear…`).
    2. Weight-only: one node (`GroupQuantWeightOnly…`).
    3. 16-bit weights: MatMul with a float initializer.
    4. A linear without bias gets one of zeros: the kernels' pointer may not be null here.
    5. Inputs that a variant does not read repeat one that is at hand (`plugin_nodes.py`).
    """

    def __init__(
        self, contents: Mapping[str, LinearContents], packing: KernelPacking, dtype: ComputeDtype
    ) -> None:
        super().__init__()
        if dtype != "float16":
            raise InputError(f"the plugins compute in float16, got {dtype}; use --dtype float16")
        self.contents = contents
        self.packing = packing

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        lowering = _PluginLowering(model, self.packing)
        result = lowering.lower_all(self.contents)
        for variant in lowering.used:
            function = function_of(variant)
            model.functions[function.identifier()] = function
        if lowering.used:
            model.graph.opset_imports[QDIT_DOMAIN] = 1
        return result


class _PluginLowering(LinearLowering):
    def __init__(self, model: ir.Model, packing: KernelPacking) -> None:
        super().__init__(model, "float16")
        self.packing = packing
        self.used: dict[Variant, None] = {}
        self._rows: dict[tuple[int, str], tuple[ir.Value, ...]] = {}

    def lower(self, node: ir.Node, contents: LinearContents) -> None:
        super().lower(node, contents)
        quantized = contents.scheme.quantizes_weights
        self.records[contents.spec.name][PRECISION] = "PLUGIN" if quantized else "FP16"

    def product(self, x: ir.Value, contents: LinearContents, shape: ir.Shape) -> ir.Value:
        if contents.scheme.quantizes_activations:
            return self._integer_product(x, contents, shape)
        if contents.scheme.quantizes_weights:
            return self._weight_only_product(x, contents, shape)
        return self.multiply(x, self.matrix(contents), contents, shape)

    def _integer_product(self, x: ir.Value, contents: LinearContents, shape: ir.Shape) -> ir.Value:
        spec, scheme = contents.spec, contents.scheme
        k = spec.in_features
        layout = self.packing.rows(scheme, k)
        group = scheme.activation_group_size(k)
        values, scale, zero, total = self._quantized_rows(
            x, layout, k, group, scheme.activation_bits
        )
        operands = self.packing.product(contents)
        weight = self._operand(f"{spec.name}.weight", operands.weight)
        channel_scale = self._operand(f"{spec.name}.weight_scale", operands.scale)
        inputs = [
            values,
            scale,
            total,
            zero,
            weight,
            channel_scale,
            self._operand_or(f"{spec.name}.weight_zero", operands.zero, channel_scale),
            self._operand_or(f"{spec.name}.weight_total", operands.total, channel_scale),
            self._operand_or(f"{spec.name}.weight_multiplier", operands.multiplier, weight),
            self._bias_of(contents),
            x,
            x,
        ]
        attributes = {
            "width": k,
            "activation_group": group,
            "weight_group": scheme.weight_group_size(k),
        }
        outputs = ((f"{spec.name}.output", _HALF, list(shape)),)
        return self._node(operands.variant, inputs, spec.name, operands.kind, attributes, outputs)[
            0
        ]

    def _weight_only_product(
        self, x: ir.Value, contents: LinearContents, shape: ir.Shape
    ) -> ir.Value:
        spec = contents.spec
        operands = self.packing.weight_only(contents)
        scale = self._operand(f"{spec.name}.weight_scale", operands.scale)
        inputs = [
            x,
            self._operand(f"{spec.name}.weight", operands.weight),
            scale,
            self._operand_or(f"{spec.name}.weight_zero", operands.zero, scale),
            self._bias_of(contents),
        ]
        k = spec.in_features
        attributes = {"width": k, "weight_group": contents.scheme.weight_group_size(k)}
        outputs = ((f"{spec.name}.output", _HALF, list(shape)),)
        return self._node(operands.variant, inputs, spec.name, operands.kind, attributes, outputs)[
            0
        ]

    def _quantized_rows(
        self, x: ir.Value, layout: RowsLayout, width: int, group: int, bits: int
    ) -> tuple[ir.Value, ...]:
        key = (id(x), layout.kind)
        if key in self._rows:
            return self._rows[key]
        asymmetric = layout.variant.asymmetric
        steps = (1 << bits) - 1 if asymmetric else (1 << (bits - 1)) - 1
        attributes = {"width": width, "group": group, "steps": float(steps)}
        if layout.variant.sums:
            attributes["segment"] = layout.segment
        name = f"{x.name}/rows"
        rows = ir.SymbolicDim(None)
        one: _Dims = [1]
        scales: _Dims = [layout.groups, rows]
        sums: _Dims = [layout.sums, rows]
        outputs: tuple[_Output, ...] = (
            (f"{name}.values", _INT8, [layout.panels, rows, PANEL]),
            (f"{name}.scale", _FLOAT, scales),
            (f"{name}.zero", _FLOAT, scales if asymmetric else one),
            (f"{name}.sums", _FLOAT, sums if layout.variant.sums else one),
        )
        self._rows[key] = self._node(
            layout.variant, [x, x, x], name, layout.kind, attributes, outputs
        )
        return self._rows[key]

    def _bias_of(self, contents: LinearContents) -> ir.Value:
        name, n = f"{contents.spec.name}.bias", contents.spec.out_features
        if contents.bias is not None:
            return self.bias(contents.bias, name)
        return self.emit.initializer(
            name, _HALF, [n], lambda: ir.tensor(np.zeros(n, np.float16), _HALF)
        )

    def _operand(self, name: str, operand: Operand) -> ir.Value:
        load = partial(_tensor, operand)
        return self.emit.initializer(name, operand.dtype, operand.shape, load)

    def _operand_or(self, name: str, operand: Operand | None, otherwise: ir.Value) -> ir.Value:
        return otherwise if operand is None else self._operand(name, operand)

    def _node(
        self,
        variant: Variant,
        inputs: Sequence[ir.Value],
        name: str,
        kind: str,
        attributes: Mapping[str, int | float],
        outputs: Sequence[_Output],
    ) -> tuple[ir.Value, ...]:
        self.used[variant] = None
        given = {
            **attributes,
            KIND: kind,
            "plugin_namespace": NAMESPACE,
            "plugin_version": PLUGIN_VERSION,
            "aot": 1,
        }
        made = ir.node(
            variant.name, inputs, given, domain=QDIT_DOMAIN, name=name, num_outputs=len(outputs)
        )
        for value, (output_name, dtype, shape) in zip(made.outputs, outputs, strict=True):
            value.name, value.dtype, value.shape = output_name, dtype, ir.Shape(shape)
        if self.emit.anchor is None:
            raise ValueError("set the anchor before emitting nodes")
        self.graph.insert_before(self.emit.anchor, made)
        return tuple(made.outputs)


def _tensor(operand: Operand) -> ir.TensorProtocol:
    return ir.tensor(np.ascontiguousarray(operand.load()), operand.dtype)
