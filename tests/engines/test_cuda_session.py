"""Runs on bound memory, as CUDA graphs need them: on the CPU, where there is no graph."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from qdit.engines.cuda_session import GraphRunner, load_cuda_libraries
from qdit.engines.onnxruntime_engine import OnnxRuntimeEngine


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """y [batch, 3] = x + number, with two inputs of two dtypes."""
    nodes = [
        helper.make_node("Cast", ["number"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["wide", "last"], ["column"]),
        helper.make_node("Add", ["x", "column"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "sum",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3]),
            helper.make_tensor_value_info("number", TensorProto.INT64, ["batch"]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor("last", TensorProto.INT64, [1], [1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    file = tmp_path_factory.mktemp("sum") / "sum.onnx"
    file.write_bytes(model.SerializeToString())
    return file


def _inputs(batch: int, first: float) -> dict[str, np.ndarray]:
    x = np.arange(first, first + 3 * batch, dtype=np.float32).reshape(batch, 3)
    return {"x": x, "number": np.arange(batch, dtype=np.int64)}


def test_bound_runs_compute_what_plain_ones_do(path: Path) -> None:
    """Shapes in turn: each is bound once, and its memory is written anew in every run."""
    engine = OnnxRuntimeEngine(path, threads=1)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    runner = GraphRunner(session, engine.input_specs, engine.output_specs, "cpu")
    kept = []
    for batch, first in ((2, 0.0), (4, 10.0), (2, 20.0), (4, 30.0)):
        inputs = _inputs(batch, first)
        made = runner.run(["y"], inputs)["y"]
        np.testing.assert_array_equal(made, engine.infer(inputs)["y"])
        kept.append((made, made.copy()))
    for made, then in kept:  # a later run must not write into what an earlier one returned
        np.testing.assert_array_equal(made, then)


def test_inputs_of_any_layout_are_taken(path: Path) -> None:
    engine = OnnxRuntimeEngine(path, threads=1)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    runner = GraphRunner(session, engine.input_specs, engine.output_specs, "cpu")
    turned = {"x": np.asfortranarray(_inputs(4, 0.0)["x"]), "number": np.arange(8)[::2]}
    runner.run(["y"], turned)
    made = runner.run(["y"], turned)["y"]
    np.testing.assert_array_equal(made, turned["x"] + turned["number"][:, None])


def test_libraries_that_are_not_there_are_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def preload() -> None:
        sys.stdout.write("Failed to load libcublas.so.13\n")
        raise RuntimeError("no such directory")

    monkeypatch.setattr(onnxruntime, "preload_dlls", preload, raising=False)
    load_cuda_libraries()
    assert capsys.readouterr().out == ""
    monkeypatch.delattr(onnxruntime, "preload_dlls")  # as before ONNX Runtime 1.21
    load_cuda_libraries()
