"""Nodes that do nothing or compute what is known: to identities and constants."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

_WHOLE_AXIS = 2**31  # a Slice end at or past it takes every axis whole


class StaticShapesPass(ir.passes.InPlacePass):
    """Use what static shapes and constants tell.

    Requires: constants are initializers; value shapes as torch recorded them.
    Ensures: the same outputs. Cases:

    1. Slice from 0 to the end with step 1 → its input.
    2. Mul or Div of a value by a scalar 1 → the value.
    3. Reshape whose output has one symbolic dimension at most → a constant shape, -1 there.
    4. Kept: a Reshape with two symbolic dimensions or an unknown rank.
    5. Kept: a Slice that drops elements, a factor other than 1, a factor that broadcasts.
    6. Einsum of one input that only permutes its axes → Transpose.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.domain:
                continue
            if _takes_all(node) or _times_one(node):
                modified |= _forward(node)
            elif node.op_type == "Reshape":
                modified |= _fix_shape(node, model.graph)
            elif node.op_type == "Einsum":
                modified |= _to_transpose(node, model.graph)
        return ir.passes.PassResult(model, modified)


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """The array of an initializer, None for anything else."""
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    return value.const_value.numpy()


def _forward(node: ir.Node) -> bool:
    """Let the readers of the node's output read its first input; the node becomes dead."""
    source, output = node.inputs[0], node.outputs[0]
    if source is None or output.is_graph_output():
        return False
    ir.convenience.replace_all_uses_with(output, source)
    return True


def _takes_all(node: ir.Node) -> bool:
    if node.op_type != "Slice" or len(node.inputs) < 3 or not node.outputs[0].uses():
        return False
    starts, ends = constant_of(node.inputs[1]), constant_of(node.inputs[2])
    steps = constant_of(node.inputs[4]) if len(node.inputs) > 4 else np.ones(1)
    if starts is None or ends is None or steps is None:
        return False
    return bool((starts == 0).all() and (ends >= _WHOLE_AXIS).all() and (steps == 1).all())


def _times_one(node: ir.Node) -> bool:
    if node.op_type not in ("Mul", "Div") or not node.outputs[0].uses():
        return False
    factor = constant_of(node.inputs[1])
    return factor is not None and factor.shape == () and bool(factor == 1)


def _fix_shape(node: ir.Node, graph: ir.Graph) -> bool:
    shape, given = node.outputs[0].shape, node.inputs[1]
    if shape is None or given is None or given.is_initializer():
        return False
    sizes = [dim if isinstance(dim, int) else -1 for dim in shape]
    if sizes.count(-1) > 1:
        return False
    name = f"shape/{'x'.join(map(str, sizes))}"
    constant = graph.initializers.get(name)
    if constant is None:
        constant = ir.Value(name=name, const_value=ir.tensor(np.array(sizes, np.int64), name=name))
        constant.shape, constant.dtype = ir.Shape([len(sizes)]), ir.DataType.INT64
        graph.register_initializer(constant)
    node.replace_input_with(1, constant)
    return True


def _to_transpose(node: ir.Node, graph: ir.Graph) -> bool:
    before, arrow, after = node.attributes["equation"].as_string().replace(" ", "").partition("->")
    letters = set(before)
    if not arrow or not before.isalpha() or len(letters) < len(before) or letters != set(after):
        return False
    old = node.outputs[0]
    permutation = [before.index(letter) for letter in after]
    made = ir.node("Transpose", [node.inputs[0]], {"perm": permutation}, num_outputs=1)
    made.metadata_props.update(node.metadata_props)
    made.outputs[0].shape, made.outputs[0].type = old.shape, old.type
    graph.insert_before(node, made)
    ir.convenience.replace_all_uses_with(old, made.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)
    return True
