"""Adding nodes and initializers to a graph, with their names, dtypes and shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from .opsets import ORT_DOMAIN

Dims = Sequence[int | ir.SymbolicDim] | ir.Shape


class Emitter:
    """Inserts nodes before an anchor node; constants of equal value are shared graph-wide."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.anchor: ir.Node | None = None
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        name: str,
        dtype: ir.DataType,
        shape: Dims,
        **attributes: Any,
    ) -> ir.Value:
        """Insert a standard operator with one output; node and output are called `name`."""
        return self._insert("", op_type, inputs, name, dtype, shape, attributes)

    def contrib(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        dtype: ir.DataType,
        shape: Dims,
        **attributes: Any,
    ) -> ir.Value:
        """The same with one of ONNX Runtime's own; None is an absent optional input."""
        last = max(index for index, value in enumerate(inputs) if value is not None)
        given = inputs[: last + 1]
        return self._insert(ORT_DOMAIN, op_type, given, name, dtype, shape, attributes)

    def _insert(
        self,
        domain: str,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        dtype: ir.DataType,
        shape: Dims,
        attributes: Mapping[str, Any],
    ) -> ir.Value:
        if self.anchor is None:
            raise ValueError("set the anchor before emitting nodes")
        made = ir.node(op_type, list(inputs), attributes, domain=domain, name=name, num_outputs=1)
        output = made.outputs[0]
        output.name, output.dtype, output.shape = name, dtype, ir.Shape(shape)
        self.graph.insert_before(self.anchor, made)
        return output

    def constant(self, value: float | Sequence[int], dtype: ir.DataType) -> ir.Value:
        """A scalar, or a list of integers, as an initializer named by its value."""
        array = np.array(value, dtype.numpy())
        key = (str(dtype), array.shape, array.tobytes())
        if key not in self._constants:
            text = "x".join(map(str, value)) if isinstance(value, Sequence) else f"{value:g}"
            name = f"constant/{dtype.name.lower()}/{text}"
            self._constants[key] = self.initializer(
                name, dtype, array.shape, lambda: ir.tensor(array, dtype)
            )
        return self._constants[key]

    def initializer(
        self,
        name: str,
        dtype: ir.DataType,
        shape: Sequence[int],
        load: Callable[[], ir.TensorProtocol],
    ) -> ir.Value:
        """An initializer whose data is made by `load()` each time it is read."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        value.const_value = ir.LazyTensor(load, dtype, ir.Shape(shape), name=name)
        self.graph.register_initializer(value)
        return value
