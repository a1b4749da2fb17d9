"""Lower abstract linears to standard operators: the `qdq` target."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch

from ..contents import LinearContents
from ..emit import Emitter
from ..opsets import BLOCKS_KEY, LINEAR_OP, LINEARS_KEY, QDIT_DOMAIN, ComputeDtype, onnx_dtype
from ..opsets import torch_dtype as as_torch_dtype
from ..qdq_activation import emit_fake_quantization
from ..qdq_weight import emit_weight


class LowerQdqPass(ir.passes.InPlacePass):
    """Replace every `qdit::GroupQuantLinear(layer)` by y = Q_a(x) Ŵ + b in standard operators.

    Requires: contents for every layer that the model names; the shape and dtype of every node's
    input known, its last dimension the layer's K; blocks recorded (`RecordBlocksPass`).
    Ensures: no node of domain 'qdit'; initializers are lazy, so nothing is loaded yet; metadata
    'qdit.linears' maps each layer to its input and output value, sizes and scheme. Cases:

    1. Quantized activations: their fake quantization (`emit_fake_quantization`) precedes MatMul.
    2. Linears that read one value with equal activation schemes share one fake quantization.
    3. Quantized weights: DequantizeLinear (`emit_weight`).
    4. Weight-only (activation bits 16): the float input goes into MatMul.
    5. 16-bit weights: MatMul with a float initializer.
    6. A bias is added after the product; without one the product is the output.
    7. Kept: everything outside the linears.
    """

    def __init__(self, contents: Mapping[str, LinearContents], dtype: ComputeDtype) -> None:
        super().__init__()
        self.contents = contents
        self.dtype: ComputeDtype = dtype

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return LinearLowering(model, self.dtype).lower_all(self.contents)


class LinearLowering:
    """The state of one run over a graph.

    Other targets override what a linear reads (`activation`), multiplies by (`matrix`) or becomes
    as a whole (`product`); names, the order of nodes and the records are the same for all.
    """

    def __init__(self, model: ir.Model, dtype: ComputeDtype) -> None:
        self.model = model
        self.graph = model.graph
        self.emit = Emitter(model.graph)
        self.dtype: ComputeDtype = dtype
        self.records: dict[str, dict[str, Any]] = {}
        self._named = set(json.loads(model.metadata_props.get(BLOCKS_KEY, "[]")))
        self._quantized: dict[tuple[int, int, int, bool], ir.Value] = {}

    def lower_all(self, contents: Mapping[str, LinearContents]) -> ir.passes.PassResult:
        """Lower every abstract linear and record them in the model's metadata."""
        for node in list(self.graph):
            if (node.domain, node.op_type) == (QDIT_DOMAIN, LINEAR_OP):
                self.lower(node, contents[node.attributes["layer"].as_string()])
        self.model.metadata_props[LINEARS_KEY] = json.dumps(self.records)
        return ir.passes.PassResult(self.model, bool(self.records))

    def lower(self, node: ir.Node, contents: LinearContents) -> None:
        self.emit.anchor = node
        spec, old = contents.spec, node.outputs[0]
        x = node.inputs[0]
        if x is None or old.shape is None:
            raise ValueError(f"{spec.name} has no input or no shape")
        self._name_input(x, spec.input_name)
        output = self.product(x, contents, old.shape)
        ir.convenience.replace_all_uses_with(old, output, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)
        self._record(contents, x, output)

    def product(self, x: ir.Value, contents: LinearContents, shape: ir.Shape) -> ir.Value:
        """y [..., N], called '<linear>.output', of the float input x [..., K]."""
        operand = self.activation(x, contents)
        return self.multiply(operand, self.matrix(contents), contents, shape)

    def multiply(
        self, operand: ir.Value, matrix: ir.Value, contents: LinearContents, shape: ir.Shape
    ) -> ir.Value:
        """MatMul and the bias, if there is one."""
        name, compute = self.product_name(contents), onnx_dtype(self.dtype)
        product = self.emit.node("MatMul", [operand, matrix], name, compute, shape)
        return self.add_bias(product, contents, shape)

    def product_name(self, contents: LinearContents) -> str:
        """What a product is called that `add_bias` follows: the output where there is no bias."""
        name = contents.spec.name
        return f"{name}.output" if contents.bias is None else f"{name}/product"

    def add_bias(self, product: ir.Value, contents: LinearContents, shape: ir.Shape) -> ir.Value:
        """product + bias as '<linear>.output'; the product itself where there is no bias."""
        if contents.bias is None:
            return product
        name, compute = contents.spec.name, onnx_dtype(self.dtype)
        bias = self.bias(contents.bias, f"{name}.bias")
        return self.emit.node("Add", [product, bias], f"{name}.output", compute, shape)

    def matrix(self, contents: LinearContents) -> ir.Value:
        """The weight [K, N] in the compute dtype."""
        return emit_weight(self.emit, contents, self.dtype)

    def activation(self, x: ir.Value, contents: LinearContents) -> ir.Value:
        """What the product reads: x, or its fake quantization."""
        scheme, k = contents.scheme, contents.spec.in_features
        if not scheme.quantizes_activations:
            return x
        bits, symmetric = scheme.activation_bits, scheme.activation_symmetric
        size = scheme.activation_group_size(k)
        key = (id(x), bits, size, symmetric)
        if key not in self._quantized:
            label = f"a{bits}_{scheme.activation_group}" + ("" if symmetric else "_asym")
            self._quantized[key] = emit_fake_quantization(
                self.emit, x, scheme, k, f"{x.name}/{label}"
            )
        return self._quantized[key]

    def bias(self, bias: torch.Tensor, name: str) -> ir.Value:
        """A bias [N] in the compute dtype."""
        array = bias.to(as_torch_dtype(self.dtype)).numpy()
        return self.emit.initializer(
            name, onnx_dtype(self.dtype), array.shape, lambda: ir.tensor(array)
        )

    def _name_input(self, x: ir.Value, name: str) -> None:
        """Call the value that a linear reads by the linear's input name, the first one wins."""
        if x.producer() is not None and x.name not in self._named:
            x.name = name
        self._named.add(str(x.name))

    def _record(self, contents: LinearContents, x: ir.Value, output: ir.Value) -> None:
        spec = contents.spec
        self.records[spec.name] = {
            "input": x.name,
            "output": output.name,
            "role": spec.role,
            "block": spec.block,
            "in_features": spec.in_features,
            "out_features": spec.out_features,
            "scheme": contents.scheme.to_json(),
        }
