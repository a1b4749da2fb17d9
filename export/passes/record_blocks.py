"""Take out the block markers and record which values they marked."""

from __future__ import annotations

import json

import onnx_ir as ir

from ..opsets import BLOCK_OP, BLOCKS_KEY, QDIT_DOMAIN


class RecordBlocksPass(ir.passes.InPlacePass):
    """Remove every `qdit::BlockOutput(block)`, an identity, and name the value it marked.

    Requires: markers in block order, each on a value that a node made.
    Ensures: the marked value is called '<block path>.output'; metadata 'qdit.blocks' lists these
    names in order. Kept: everything else.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        names: list[str] = []
        for node in list(model.graph):
            if (node.domain, node.op_type) != (QDIT_DOMAIN, BLOCK_OP):
                continue
            marked, output = node.inputs[0], node.outputs[0]
            if marked is None or marked.producer() is None:
                raise ValueError(f"{node.name} marks no computed value")
            marked.name = f"{node.attributes['block'].as_string()}.output"
            ir.convenience.replace_all_uses_with(output, marked, replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
            names.append(marked.name)
        model.metadata_props[BLOCKS_KEY] = json.dumps(names)
        return ir.passes.PassResult(model, bool(names))
