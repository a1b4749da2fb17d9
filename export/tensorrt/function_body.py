"""Building the body of a local ONNX function, node by node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..opsets import DEFAULT_OPSET


class Body:
    """A function under construction: values have names and no types, attributes are references."""

    def __init__(self, inputs: Sequence[str]) -> None:
        self.inputs = [ir.Value(name=name) for name in inputs]
        self.nodes: list[ir.Node] = []
        self.attributes: dict[str, ir.AttributeType] = {}

    def __getitem__(self, name: str) -> ir.Value:
        return next(value for value in self.inputs if value.name == name)

    def op(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """The output of a standard operator. An attribute may be a `ref`."""
        given = {key: value for key, value in attributes.items() if not isinstance(value, ir.Attr)}
        made = ir.node(op_type, list(inputs), given, num_outputs=1)
        for key, value in attributes.items():
            if isinstance(value, ir.Attr):
                made.attributes[key] = ir.RefAttr(key, str(value.ref_attr_name), value.type)
        made.name = f"{op_type}_{len(self.nodes)}"
        made.outputs[0].name = made.name
        self.nodes.append(made)
        return made.outputs[0]

    def ref(self, name: str, kind: ir.AttributeType = ir.AttributeType.INT) -> ir.Attr:
        """A reference to the function's attribute, which is declared by it."""
        self.attributes[name] = kind
        return ir.RefAttr(name, name, kind)

    def number(self, name: str) -> ir.Value:
        """The function's integer attribute as INT64 [1]."""
        scalar = self.op("Constant", value_int=self.ref(name))
        return self.op("Reshape", scalar, self.ints(1))

    def real(self, name: str) -> ir.Value:
        """The function's float attribute as a scalar."""
        return self.op("Constant", value_float=self.ref(name, ir.AttributeType.FLOAT))

    def ints(self, *values: int) -> ir.Value:
        """INT64 [n]."""
        return self.op("Constant", value_ints=list(values))

    def table(self, values: np.ndarray) -> ir.Value:
        """A small constant array."""
        return self.op("Constant", value=ir.tensor(values))

    def sizes(self, *parts: ir.Value | int) -> ir.Value:
        """A shape of numbers and INT64 [1] values."""
        values = [self.ints(part) if isinstance(part, int) else part for part in parts]
        return self.op("Concat", *values, axis=0)

    def ceiling(self, value: ir.Value, step: ir.Value | int) -> ir.Value:
        """⌈value / step⌉ of positive INT64 [1]."""
        by = self.ints(step) if isinstance(step, int) else step
        raised = self.op("Sub", self.op("Add", value, by), self.ints(1))
        return self.op("Div", raised, by)

    def rounded_up(self, value: ir.Value, step: int) -> ir.Value:
        """The next multiple of `step`."""
        return self.op("Mul", self.ceiling(value, step), self.ints(step))

    def head(self, value: ir.Value, count: ir.Value, axis: int) -> ir.Value:
        """The first `count` along an axis."""
        return self.op("Slice", value, self.ints(0), count, self.ints(axis))

    def function(self, domain: str, name: str, outputs: Sequence[ir.Value]) -> ir.Function:
        """The finished function."""
        opsets = {"": DEFAULT_OPSET}
        graph = ir.Graph(self.inputs, outputs, nodes=self.nodes, opset_imports=opsets, name=name)
        declared = [ir.Attr(key, kind, None) for key, kind in self.attributes.items()]
        return ir.Function(domain, name, graph=graph, attributes=declared)
