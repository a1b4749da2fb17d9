"""An ONNX file as the rules look at it: nodes with their constants, dtypes and shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, NodeProto, TensorProto, ValueInfoProto

from ...errors import ArtifactError

# Constants up to this many values are looked into; a rule that needs a larger one's values says so.
_LARGEST_READ = 1 << 24
_STANDARD = ("", "ai.onnx")

Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class ParsedFile:
    """A model without its external data, and the folder that holds that."""

    model: onnx.ModelProto
    folder: Path

    @classmethod
    def read(cls, path: Path) -> ParsedFile:
        """Raises `ArtifactError` for what is no ONNX file."""
        try:
            model = onnx.load(path, load_external_data=False)
            if not model.graph.node:
                raise ValueError("it has no nodes")
        except Exception as error:  # protobuf raises kinds of its own
            raise ArtifactError(f"{path} is not a readable ONNX file: {error}") from error
        return cls(model, path.parent)

    @cached_property
    def opset(self) -> int:
        """Of the standard domain; 0 where the model imports none."""
        return max((e.version for e in self.model.opset_import if e.domain in _STANDARD), default=0)

    @cached_property
    def initializers(self) -> dict[str, TensorProto]:
        """Initializers and the values of Constant nodes, by name."""
        found = {tensor.name: tensor for tensor in self.model.graph.initializer}
        for node in self.model.graph.node:
            if node.op_type == "Constant" and node.domain in _STANDARD:
                value = attribute(node, "value")
                if isinstance(value, TensorProto):
                    found[node.output[0]] = value
        return found

    @cached_property
    def makers(self) -> dict[str, NodeProto]:
        """The node of every value that a node makes."""
        return {output: node for node in self.model.graph.node for output in node.output if output}

    @cached_property
    def readers(self) -> dict[str, list[NodeProto]]:
        found: dict[str, list[NodeProto]] = {}
        for node in self.model.graph.node:
            for name in node.input:
                found.setdefault(name, []).append(node)
        return found

    @cached_property
    def functions(self) -> dict[tuple[str, str], onnx.FunctionProto]:
        return {(entry.domain, entry.name): entry for entry in self.model.functions}

    @cached_property
    def _values(self) -> dict[str, ValueInfoProto]:
        try:
            inferred = onnx.shape_inference.infer_shapes(self.model)
        except Exception:  # an invalid model: what it declares itself has to do
            inferred = self.model
        graph = inferred.graph
        values = (*graph.input, *graph.value_info, *graph.output)
        return {value.name: value for value in values}

    def dtype(self, name: str) -> int | None:
        """TensorProto's number, None where it is not known."""
        if name in self.initializers:
            return int(self.initializers[name].data_type)
        value = self._values.get(name)
        kind = value.type.tensor_type.elem_type if value is not None else 0
        return kind or None

    def shape(self, name: str) -> Shape | None:
        """Sizes, None for dynamic ones; None where nothing is known."""
        if name in self.initializers:
            return tuple(self.initializers[name].dims)
        value = self._values.get(name)
        if value is None or not value.type.tensor_type.HasField("shape"):
            return None
        dims = value.type.tensor_type.shape.dim
        return tuple(d.dim_value if d.HasField("dim_value") else None for d in dims)

    def constant(self, name: str) -> np.ndarray | None:
        """A constant's values, None for what is not constant or too large to look into."""
        tensor = self.initializers.get(name)
        if tensor is None or int(np.prod(tensor.dims)) > _LARGEST_READ:
            return None
        return np.asarray(onnx.numpy_helper.to_array(tensor, str(self.folder)))

    def is_constant(self, name: str) -> bool:
        """Whether TensorRT knows the value when it builds: an initializer, or what only such
        values make through operators that keep them (Identity, Cast, Transpose, Reshape)."""
        if name in self.initializers:
            return True
        maker = self.makers.get(name)
        kept = ("Identity", "Cast", "Transpose", "Reshape")
        return (
            maker is not None
            and maker.op_type in kept
            and all(self.is_constant(given) for given in maker.input)
        )

    def nodes(self, *op_types: str) -> Iterator[NodeProto]:
        """Standard operators of these types, in order; every one without types."""
        for node in self.model.graph.node:
            if node.domain in _STANDARD and (not op_types or node.op_type in op_types):
                yield node


def attribute(node: NodeProto, name: str) -> object:
    """An attribute's value; None where it is not set."""
    found = next((entry for entry in node.attribute if entry.name == name), None)
    if found is None or found.type == AttributeProto.UNDEFINED:
        return None
    value: object = onnx.helper.get_attribute_value(found)
    return value.decode() if isinstance(value, bytes) else value


def place(node: NodeProto) -> str:
    """How a line names a node."""
    return node.name or f"the {node.op_type} that makes {node.output[0]}"


def type_name(dtype: int | None) -> str:
    return "an unknown type" if dtype is None else TensorProto.DataType.Name(dtype)
