"""A model's `MatMulNBits` at accuracy level 4 → our own operator of the same constants."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

DOMAIN, OPERATOR = "qdit.cpu", "GroupwiseMatMul"
_FROM_DOMAIN, REPLACED = "com.microsoft", "MatMulNBits"
_VERSION = 1
_INTEGER_LEVEL = 4
_SMALLEST_GROUP = 32
_SIZES = ("K", "N", "bits", "block_size")
_ATTRIBUTES = {*_SIZES, "accuracy_level"}
# MatMulNBits' inputs by position; ours are the same without the group indices.
_GROUP_INDICES = 4
_TAKEN = (0, 1, 2, 3, 5)


@dataclass(frozen=True)
class _Graph:
    """What a node's inputs are looked up in: initializers, but those that a caller may replace."""

    constants: Mapping[str, onnx.TensorProto]

    @classmethod
    def of(cls, graph: onnx.GraphProto) -> _Graph:
        inputs = {value.name for value in graph.input}
        return cls({one.name: one for one in graph.initializer if one.name not in inputs})

    def holds(self, name: str, elements: Set[int]) -> bool:
        """Whether `name` is a constant of one of these element types."""
        constant = self.constants.get(name)
        return constant is not None and constant.data_type in elements


def count_products(model: onnx.ModelProto) -> int:
    """How many nodes `swap_products` would replace."""
    graph = _Graph.of(model.graph)
    return sum(_is_taken(node, graph) for node in model.graph.node)


def swap_products(model: onnx.ModelProto) -> int:
    """Replace `com.microsoft::MatMulNBits` by `qdit.cpu::GroupwiseMatMul`; how many nodes it were.

    Requires: external data may be absent; only types and names of initializers are read.
    Ensures: the same inputs, outputs and names; initializers as they were. Cases:

    1. Accuracy level 4 (activations quantized in blocks), 4 or 8 bits, blocks of a multiple of 32
       that divide K, float32 scales: replaced, its bias and zero points with it.
    2. Kept: another level, block or number of bits; group indices, zero points that are no uint8,
       attributes that are not MatMulNBits' first ones; whatever the graph computes or a caller may
       replace in place of a constant; nodes within the branches of others.
    """
    graph, count = _Graph.of(model.graph), 0
    for node in model.graph.node:
        if _is_taken(node, graph):
            _swap(node)
            count += 1
    if count and all(entry.domain != DOMAIN for entry in model.opset_import):
        model.opset_import.add(domain=DOMAIN, version=_VERSION)
    return count


def _is_taken(node: onnx.NodeProto, graph: _Graph) -> bool:
    if node.op_type != REPLACED or node.domain != _FROM_DOMAIN:
        return False
    attributes = {entry.name: entry.i for entry in node.attribute}
    return attributes.keys() <= _ATTRIBUTES and _is_ours(attributes) and _is_constant(node, graph)


def _is_ours(attributes: Mapping[str, int]) -> bool:
    bits, size = attributes.get("bits", 4), attributes.get("block_size", 0)
    return (
        attributes.get("accuracy_level") == _INTEGER_LEVEL
        and bits in (4, 8)
        and size >= _SMALLEST_GROUP
        and size % _SMALLEST_GROUP == 0
        and attributes.get("K", 1) % size == 0
    )


def _is_constant(node: onnx.NodeProto, graph: _Graph) -> bool:
    from onnx import TensorProto

    floats, bytes_ = {TensorProto.FLOAT}, {TensorProto.UINT8}
    inputs = [*node.input, *[""] * (_TAKEN[-1] + 1 - len(node.input))]
    _, weight, scale, zero_points, _, bias = inputs
    return (
        len(inputs) == _TAKEN[-1] + 1
        and not inputs[_GROUP_INDICES]
        and graph.holds(weight, bytes_)
        and graph.holds(scale, floats)
        and (not zero_points or graph.holds(zero_points, bytes_))
        and (not bias or graph.holds(bias, floats))
    )


def _swap(node: onnx.NodeProto) -> None:
    from onnx import helper

    given = list(node.input)
    inputs = [given[place] if place < len(given) else "" for place in _TAKEN]
    while not inputs[-1]:
        inputs.pop()
    attributes: dict[str, Any] = {"bits": 4}
    attributes |= {entry.name: entry.i for entry in node.attribute if entry.name in _SIZES}
    node.op_type, node.domain = OPERATOR, DOMAIN
    del node.input[:], node.attribute[:]
    node.input.extend(inputs)
    node.attribute.extend(helper.make_attribute(name, attributes[name]) for name in _SIZES)
