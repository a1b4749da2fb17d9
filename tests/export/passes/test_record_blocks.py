"""`RecordBlocksPass`: markers go, names stay."""

from __future__ import annotations

import json

import onnx
import onnx_ir as ir
import pytest

from qdit.export.passes.record_blocks import RecordBlocksPass


def _model(body: str) -> ir.Model:
    head = '<ir_version: 10, opset_import: ["" : 21, "qdit" : 1]> g (float[2] x) => (float[2] y) '
    return ir.from_proto(onnx.parser.parse_model(head + body))


def test_names_the_marked_values_in_order() -> None:
    model = _model(
        """{ a = Relu(x) b = qdit.BlockOutput<block = "blocks.0">(a) c = Neg(b) d = Abs(a)
             e = Add(c, d) f = qdit.BlockOutput<block = "blocks.1">(e) y = Relu(f) }"""
    )
    assert RecordBlocksPass()(model).modified
    assert json.loads(model.metadata_props["qdit.blocks"]) == ["blocks.0.output", "blocks.1.output"]
    assert [node.op_type for node in model.graph] == ["Relu", "Neg", "Abs", "Add", "Relu"]
    assert model.graph[1].inputs[0].name == model.graph[2].inputs[0].name == "blocks.0.output"


def test_a_marked_graph_output_stays_an_output() -> None:
    model = _model('{ a = Relu(x) y = qdit.BlockOutput<block = "b">(a) }')
    RecordBlocksPass()(model)
    assert [output.name for output in model.graph.outputs] == ["b.output"]


def test_records_an_empty_list_without_markers() -> None:
    model = _model("{ y = Relu(x) }")
    assert not RecordBlocksPass()(model).modified
    assert model.metadata_props["qdit.blocks"] == "[]"


def test_refuses_a_marker_on_an_input() -> None:
    model = _model('{ a = qdit.BlockOutput<block = "b">(x) y = Relu(a) }')
    with pytest.raises(ir.passes.PassError) as caught:
        ir.passes.Sequential(RecordBlocksPass())(model)
    assert "marks no computed value" in str(caught.value.__cause__)
