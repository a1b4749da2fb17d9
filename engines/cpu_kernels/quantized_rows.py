"""Recognize rows that the graph quantizes in groups, as `emit_restored_groups` writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

_STEPS = 127.0  # of symmetric 8-bit integers
LEAST_SCALE = 2.0**-24  # calibrate.integers.MIN_SCALE, which would bring torch with it


@dataclass(frozen=True)
class QuantizedRows:
    """Channels `first` … of Q(source): symmetric 8-bit fake quantization of `source` [..., width]
    in groups of `group`, each times one of `signs`, a constant [width/group] ('' for none)."""

    source: str
    signs: str
    first: int
    width: int
    group: int


class GraphView:
    """What makes each value of a graph, and its constants: initializers, but those that a caller
    may replace."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        inputs = {value.name for value in graph.input}
        self.constants: Mapping[str, onnx.TensorProto] = {
            one.name: one for one in graph.initializer if one.name not in inputs
        }
        self._makers = {name: node for node in graph.node for name in node.output}

    def maker(self, name: str, operator: str) -> onnx.NodeProto | None:
        """The node of ONNX's own domain and of that operator that makes a value, or None."""
        node = self._makers.get(name)
        is_it = node is not None and node.op_type == operator and node.domain in ("", "ai.onnx")
        return node if is_it else None

    def numbers(self, name: str) -> list[float] | None:
        """A constant's values where the file holds them itself, None otherwise."""
        from onnx import TensorProto, numpy_helper

        constant = self.constants.get(name)
        if constant is None or constant.data_location == TensorProto.EXTERNAL:
            return None
        return [float(number) for number in numpy_helper.to_array(constant).ravel()]


def find_quantized_rows(view: GraphView, name: str) -> QuantizedRows | None:
    """The rows behind a value that is their fake quantization or a slice of it; else None.

    Cases: 1. the whole: Reshape of groups; 2. channels from a constant on: a Slice of it.
    """
    first = 0
    if cut := view.maker(name, "Slice"):
        start = _first_channel(view, cut)
        if start is None:
            return None
        name, first = cut.input[0], start
    flat = view.maker(name, "Reshape")
    restored = flat and view.maker(flat.input[0], "Mul")
    whole = restored and view.maker(restored.input[0], "Cast")
    integers = whole and view.maker(whole.input[0], "QuantizeLinear")
    if restored is None or integers is None or len(integers.input) != 2:
        return None
    groups, scale = integers.input
    source, shape = _grouped(view, groups)
    if not shape or not _is_blocked(integers, shape[-1]) or not _is_scale(view, scale, groups):
        return None
    signs = _signs(view, restored.input[1], scale)
    if signs is None:
        return None
    return QuantizedRows(source, signs, first, shape[-2] * shape[-1], shape[-1])


def _first_channel(view: GraphView, cut: onnx.NodeProto) -> int | None:
    """Where a Slice of the last dimension begins; None for other ones."""
    if len(cut.input) != 4 or view.numbers(cut.input[3]) != [-1.0]:
        return None
    start = view.numbers(cut.input[1])
    return int(start[0]) if start and len(start) == 1 and start[0] >= 0 else None


def _grouped(view: GraphView, groups: str) -> tuple[str, list[int]]:
    """What is reshaped into [..., count, size], and that shape; empty where it is none."""
    made = view.maker(groups, "Reshape")
    shape = made and view.numbers(made.input[1])
    if made is None or not shape or len(shape) < 2 or min(shape[-2:]) < 1:
        return "", []
    return made.input[0], [int(number) for number in shape]


def _is_blocked(integers: onnx.NodeProto, size: int) -> bool:
    from onnx import TensorProto

    given = {entry.name: entry.i for entry in integers.attribute}
    return (given.get("axis"), given.get("block_size"), given.get("output_dtype")) == (
        -1,
        size,
        TensorProto.INT8,
    )


def _is_scale(view: GraphView, scale: str, groups: str) -> bool:
    """Whether it is max(max / 127, min / -127, MIN_SCALE) over each group."""
    largest = view.maker(scale, "Max")
    if largest is None or len(largest.input) != 3:
        return False
    high, low, least = largest.input
    return (
        _is_bound(view, high, "ReduceMax", groups, _STEPS)
        and _is_bound(view, low, "ReduceMin", groups, -_STEPS)
        and view.numbers(least) == [LEAST_SCALE]
    )


def _is_bound(view: GraphView, name: str, operator: str, groups: str, divisor: float) -> bool:
    divided = view.maker(name, "Div")
    reduced = divided and view.maker(divided.input[0], operator)
    return (
        divided is not None
        and reduced is not None
        and view.numbers(divided.input[1]) == [divisor]
        and list(reduced.input[:1]) == [groups]
        and len(reduced.input) == 2
        and view.numbers(reduced.input[1]) == [-1.0]
    )


def _signs(view: GraphView, factor: str, scale: str) -> str | None:
    """'' where groups are restored by their scale, the constant where by scale · it; else None."""
    if factor == scale:
        return ""
    turned = view.maker(factor, "Mul")
    if turned is None or turned.input[0] != scale:
        return None
    numbers = view.numbers(turned.input[1])
    return turned.input[1] if numbers and set(numbers) <= {1.0, -1.0} else None
