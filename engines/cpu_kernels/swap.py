"""A model's quantization of rows and `MatMulNBits` at accuracy level 4 → our own operator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, MutableSequence, Set
from typing import TYPE_CHECKING, Any

from .quantized_rows import GraphView, QuantizedRows, find_quantized_rows

if TYPE_CHECKING:
    import onnx

DOMAIN, OPERATOR = "qdit.cpu", "GroupwiseMatMul"
_FROM_DOMAIN, REPLACED = "com.microsoft", "MatMulNBits"
_VERSION = 1
_INTEGER_LEVEL = 4
_SMALLEST_GROUP = 32
_SIZES = ("K", "N", "bits", "block_size")
_ATTRIBUTES = {*_SIZES, "accuracy_level"}
# MatMulNBits' inputs by position; ours after the rows are the same without the group indices.
_GROUP_INDICES = 4
_TAKEN = (1, 2, 3, 5)


def count_products(model: onnx.ModelProto) -> int:
    """How many nodes `swap_products` would replace."""
    view = GraphView(model.graph)
    return sum(_rows_of(node, view) is not None for node in model.graph.node)


def swap_products(model: onnx.ModelProto) -> int:
    """Replace `com.microsoft::MatMulNBits` by `qdit.cpu::GroupwiseMatMul`; how many nodes it were.

    Requires: external data may be absent; of initializers, types and the values of small ones are
    read.
    Ensures: the same inputs, outputs and names of products. Cases:

    1. Accuracy level 4 (activations quantized in blocks), 4 or 8 bits, blocks of a multiple of 32
       that divide K, float32 scales, fed with rows that the graph quantizes in the same blocks
       (`find_quantized_rows`): replaced, its bias and zero points with it. The operator reads the
       rows themselves and quantizes them; what did so before goes where nothing else needs it.
    2. Kept: other rows. Those of weight-only adaLN are three a sample, and few rows are what
       MatMulNBits is fastest at.
    3. Kept: another level, block or number of bits; group indices, zero points that are no uint8,
       attributes that are not MatMulNBits' first ones; whatever the graph computes or a caller may
       replace in place of a constant; nodes within the branches of others.
    """
    view, replaced = GraphView(model.graph), []
    for node in model.graph.node:
        if rows := _rows_of(node, view):
            replaced.append(node.input[0])
            _swap(node, rows)
    _remove_unused(model.graph, replaced)
    if replaced and all(entry.domain != DOMAIN for entry in model.opset_import):
        model.opset_import.add(domain=DOMAIN, version=_VERSION)
    return len(replaced)


def _rows_of(node: onnx.NodeProto, view: GraphView) -> QuantizedRows | None:
    """The rows of a node that is to be replaced, None for others."""
    if node.op_type != REPLACED or node.domain != _FROM_DOMAIN:
        return None
    given = {entry.name: entry.i for entry in node.attribute}
    if not given.keys() <= _ATTRIBUTES or not _is_ours(given) or not _is_constant(node, view):
        return None
    rows = find_quantized_rows(view, node.input[0])
    if rows is None or rows.group != given["block_size"] or rows.first % rows.group:
        return None
    return rows


def _is_ours(attributes: Mapping[str, int]) -> bool:
    bits, size = attributes.get("bits", 4), attributes.get("block_size", 0)
    return (
        attributes.get("accuracy_level") == _INTEGER_LEVEL
        and bits in (4, 8)
        and size >= _SMALLEST_GROUP
        and size % _SMALLEST_GROUP == 0
        and attributes.get("K", 1) % size == 0
    )


def _is_constant(node: onnx.NodeProto, view: GraphView) -> bool:
    from onnx import TensorProto

    floats, bytes_ = {TensorProto.FLOAT}, {TensorProto.UINT8}
    inputs = _inputs_of(node)
    _, weight, scale, zero_points, _, bias = inputs
    return (
        len(inputs) == _TAKEN[-1] + 1
        and not inputs[_GROUP_INDICES]
        and _holds(view, weight, bytes_)
        and _holds(view, scale, floats)
        and (not zero_points or _holds(view, zero_points, bytes_))
        and (not bias or _holds(view, bias, floats))
    )


def _inputs_of(node: onnx.NodeProto) -> list[str]:
    """MatMulNBits' inputs, those that are not given at the end as '' too."""
    return [*node.input, *[""] * (_TAKEN[-1] + 1 - len(node.input))]


def _holds(view: GraphView, name: str, elements: Set[int]) -> bool:
    """Whether `name` is a constant of one of these element types."""
    constant = view.constants.get(name)
    return constant is not None and constant.data_type in elements


def _swap(node: onnx.NodeProto, rows: QuantizedRows) -> None:
    from onnx import helper

    given = _inputs_of(node)
    inputs = [rows.source, *(given[place] for place in _TAKEN), rows.signs]
    while not inputs[-1]:
        inputs.pop()
    attributes: dict[str, Any] = {"bits": 4}
    attributes |= {entry.name: entry.i for entry in node.attribute if entry.name in _SIZES}
    attributes |= {"first": rows.first, "width": rows.width}
    node.op_type, node.domain = OPERATOR, DOMAIN
    del node.input[:], node.attribute[:]
    node.input.extend(inputs)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())


def _remove_unused(graph: onnx.GraphProto, names: list[str]) -> None:
    """Remove what makes these values and, with them, has no use any more; constants too."""
    uses = Counter(name for node in graph.node for name in node.input)
    uses.update(value.name for value in graph.output)
    makers = {name: node for node in graph.node for name in node.output}
    gone = set()
    unused = [name for name in names if not uses[name]]
    while unused:
        name = unused.pop()
        gone.add(name)
        node = makers.pop(name, None)
        if node is not None and not any(uses[other] for other in node.output):
            uses.subtract(node.input)
            unused.extend(other for other in node.input if not uses[other])
    _delete(graph.node, lambda node: gone.issuperset(node.output))
    _delete(graph.initializer, lambda constant: constant.name in gone)


def _delete(items: MutableSequence[Any], is_gone: Callable[[Any], bool]) -> None:
    """Remove items by their places: a repeated field finds one by comparing it with all others."""
    for place in reversed(range(len(items))):
        if is_gone(items[place]):
            del items[place]
