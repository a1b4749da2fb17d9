"""LayerNorm and adaLN's scale and shift in one pass over the tokens."""

from __future__ import annotations

import onnx_ir as ir

from ..passes.static_shapes import constant_of


class FuseModulationPass(ir.passes.InPlacePass):
    """LayerNormalization(x, 1) · scale + shift → LayerNormalization(x, scale, shift).

    Requires: value shapes known. Ensures: the same function of the same values; the result keeps
    its name. ONNX lets LayerNormalization's scale and bias broadcast to x, and ONNX Runtime ≥ 1.21
    computes that: one pass over x [B, T, D] instead of three. Cases:

    1. x [B, T, D], its LayerNormalization over the last axis with a weight of ones and a bias of
       zeros or none, read only by a Mul with scale [B, 1, D], read only by an Add of shift
       [B, 1, D]: fused.
    2. Kept: a weight that is not all ones, a bias that is not all zeros.
    3. Kept: a scale or shift of another shape than [B, 1, D] or [1, 1, D].
    4. Kept: a normalized or scaled value that something else reads, or that is an output.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type == "LayerNormalization" and not node.domain:
                modified |= _fuse(node, model.graph)
        return ir.passes.PassResult(model, modified)


def _fuse(norm: ir.Node, graph: ir.Graph) -> bool:
    x, normalized = norm.inputs[0], norm.outputs[0]
    if x is None or not _normalizes_only(norm):
        return False
    scaling, scale = _only_reader(normalized, "Mul")
    if scaling is None or not _is_row(scale, x):
        return False
    shifting, shift = _only_reader(scaling.outputs[0], "Add")
    if shifting is None or not _is_row(shift, x):
        return False
    old = shifting.outputs[0]
    fused = ir.node("LayerNormalization", [x, scale, shift], dict(norm.attributes), name=norm.name)
    made = fused.outputs[0]
    made.shape, made.type = old.shape, old.type
    graph.insert_before(shifting, fused)  # where scale and shift are both there
    ir.convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)
    name = old.name
    for node in (shifting, scaling, norm):
        graph.remove(node, safe=True)
    made.name = name
    return True


def _normalizes_only(norm: ir.Node) -> bool:
    weight = constant_of(norm.inputs[1])
    if weight is None or not (weight == 1).all():
        return False
    if len(norm.inputs) < 3 or norm.inputs[2] is None:
        return True
    bias = constant_of(norm.inputs[2])
    return bias is not None and bool((bias == 0).all())


def _only_reader(value: ir.Value, op_type: str) -> tuple[ir.Node | None, ir.Value | None]:
    """The one node that reads `value`, if it is an `op_type`, and that node's other operand."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None, None
    node, index = uses[0]
    if node.op_type != op_type or node.domain:
        return None, None
    return node, node.inputs[1 - index]


def _is_row(value: ir.Value | None, x: ir.Value) -> bool:
    """Whether `value` is [B, 1, D] or [1, 1, D] for x [B, T, D]."""
    if value is None or value.shape is None or x.shape is None or len(x.shape) != 3:
        return False
    shape = list(value.shape)
    return (
        len(shape) == 3 and shape[0] in (x.shape[0], 1) and shape[1] == 1 and shape[2] == x.shape[2]
    )
