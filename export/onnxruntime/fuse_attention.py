"""Attention as one operator that reads tokens as the linears write them."""

from __future__ import annotations

import math

import onnx_ir as ir

from ..opsets import ORT_DOMAIN
from ..passes.static_shapes import constant_of

_HEADS_FIRST, _KEYS_LAST = [0, 2, 1, 3], [0, 1, 3, 2]


class FuseAttentionPass(ir.passes.InPlacePass):
    """softmax(factor · QKᵀ) V around transposes → com.microsoft::MultiHeadAttention.

    Requires: value shapes known; opset com.microsoft 1 may be used.
    Ensures: the same function of the same q, k and v; the result keeps its name. Cases, each with
    q, k and v [B, T, D] that are reshaped to [B, T, H, D/H] and transposed to [B, H, T, D/H]:

    1. Below opset 23: Mul of q by a constant, Transpose of k, MatMul, Softmax over the last axis,
       MatMul with v (`export/attention.py`).
    2. From opset 23 on: Attention(q, k, v) without a mask, past or causality.
    3. Either followed by Transpose and Reshape back to [B, T, D]: all of it is one node.
    4. Kept: another order of axes, a value in between that something else reads, an Attention that
       has further inputs or attributes than its scale.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type == "Reshape" and not node.domain:
                modified |= _fuse(node, model.graph)
        if modified:
            model.graph.opset_imports.setdefault(ORT_DOMAIN, 1)
        return ir.passes.PassResult(model, modified)


def _fuse(merge: ir.Node, graph: ir.Graph) -> bool:
    """Fuse the attention whose heads `merge` puts back together; False where it is none."""
    back = _transpose(merge.inputs[0], _HEADS_FIRST)
    if back is None:
        return False
    found = _operands(back.inputs[0])
    if found is None:
        return False
    heads_first, scale = found
    tokens = [_tokens(value) for value in heads_first]
    if any(value is None for value in tokens) or merge.outputs[0].shape is None:
        return False
    heads = _heads(heads_first[0])
    if heads is None or tokens[0] is None or merge.outputs[0].shape != tokens[0].shape:
        return False
    old = merge.outputs[0]
    made = ir.node(
        "MultiHeadAttention",
        tokens,
        {"num_heads": heads} | ({} if scale is None else {"scale": scale}),
        domain=ORT_DOMAIN,
        name=back.name,
    )
    output = made.outputs[0]
    output.shape, output.type = old.shape, old.type
    graph.insert_before(merge, made)
    ir.convenience.replace_all_uses_with(old, output, replace_graph_outputs=True)
    name = old.name
    graph.remove(merge, safe=True)
    output.name = name
    return True


def _operands(output: ir.Value | None) -> tuple[list[ir.Value | None], float | None] | None:
    """q, k and v [B, H, T, D/H] of the attention that makes `output`, and its factor."""
    node = _sole_producer(output)
    if node is None:
        return None
    if node.op_type == "Attention" and not node.domain:
        return _of_operator(node)
    if node.op_type != "MatMul":
        return None
    softmax = _sole_producer(node.inputs[0])
    if softmax is None or softmax.op_type != "Softmax" or softmax.attributes["axis"].as_int() != -1:
        return None
    scores = _sole_producer(softmax.inputs[0])
    if scores is None or scores.op_type != "MatMul":
        return None
    scaled, keys = _sole_producer(scores.inputs[0]), _transpose(scores.inputs[1], _KEYS_LAST)
    if scaled is None or scaled.op_type != "Mul" or keys is None:
        return None
    factor = constant_of(scaled.inputs[1])
    if factor is None or factor.size != 1:
        return None
    return [scaled.inputs[0], keys.inputs[0], node.inputs[1]], float(factor.reshape(()))


def _of_operator(node: ir.Node) -> tuple[list[ir.Value | None], float | None] | None:
    """The standard operator, if it does no more than MultiHeadAttention does without options."""
    plain = {"scale", "is_causal", "softmax_precision", "qk_matmul_output_mode", "softcap"}
    attributes = node.attributes
    causal = attributes.get("is_causal")
    softcap = attributes.get("softcap")
    does_more = (
        set(attributes) - plain
        or (causal is not None and causal.as_int() != 0)
        or (softcap is not None and not math.isclose(softcap.as_float(), 0.0))
        or any(value is not None for value in node.inputs[3:])
        or any(output.uses() for output in node.outputs[1:])
    )
    if does_more:
        return None
    scale = attributes.get("scale")
    return list(node.inputs[:3]), None if scale is None else scale.as_float()


def _tokens(heads_first: ir.Value | None) -> ir.Value | None:
    """[B, T, D] behind Reshape to [B, T, H, D/H] and Transpose to [B, H, T, D/H]."""
    turned = _transpose(heads_first, _HEADS_FIRST)
    split = None if turned is None else _sole_producer(turned.inputs[0])
    if split is None or split.op_type != "Reshape":
        return None
    tokens, parts = split.inputs[0], split.outputs[0].shape
    if tokens is None or tokens.shape is None or parts is None:
        return None
    if len(tokens.shape) != 3 or len(parts) != 4 or list(tokens.shape)[1] != list(parts)[1]:
        return None
    return tokens


def _heads(heads_first: ir.Value | None) -> int | None:
    if heads_first is None or heads_first.shape is None:
        return None
    heads = list(heads_first.shape)[1]
    return heads if isinstance(heads, int) else None


def _transpose(value: ir.Value | None, permutation: list[int]) -> ir.Node | None:
    node = _sole_producer(value)
    if node is None or node.op_type != "Transpose":
        return None
    found = list(node.attributes["perm"].as_ints()) == permutation
    return node if found else None


def _sole_producer(value: ir.Value | None) -> ir.Node | None:
    """The node that makes `value`, if only one node reads it and it is no output."""
    if value is None or value.is_graph_output() or len(list(value.uses())) != 1:
        return None
    return value.producer()
