"""Operators of a file that is read without its weights, held against `onnx` itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdit.engines.onnx_peek import operators_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A weight of 1 MB before a second use, a branch with nodes of its own, and metadata."""
    branch = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["z"])],
        "branch",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
    )
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["p"], name="Relu"),
            helper.make_node("MatMulNBits", ["p"], ["q"], domain="com.microsoft", K=1 << 40),
            helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch),
        ],
        "Sigmoid",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 512])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.zeros((512, 512), np.float32), "w")],
        doc_string="Tanh",
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, producer_name="Softmax"), path)
    return path


def test_the_graphs_own_nodes_count(path: Path) -> None:
    wanted = {node.op_type for node in onnx.load(path).graph.node}
    assert operators_of(path) == wanted == {"MatMul", "MatMulNBits", "If"}


def test_an_empty_file_has_none(tmp_path: Path) -> None:
    empty = tmp_path / "empty.onnx"
    empty.write_bytes(b"")
    assert operators_of(empty) == frozenset()


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[:-1], id="cut off"),
        pytest.param(lambda data: data[:100], id="cut off in the graph"),
        pytest.param(lambda data: b"\xff" * 50, id="no message"),
        pytest.param(lambda data: data + b"\x0f", id="a kind of field that there is not"),
        pytest.param(lambda data: data + b"\x0a", id="no length"),
    ],
)
def test_a_file_that_is_none_says_nothing(damage: object, path: Path) -> None:
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    assert operators_of(path) is None


def test_a_missing_file_is_the_callers_to_explain(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        operators_of(tmp_path / "nothing.onnx")
