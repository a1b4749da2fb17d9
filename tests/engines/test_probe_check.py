"""The probe beside a file: what it holds, what it refuses, and what an engine makes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qdit.engines.onnxruntime_engine import OnnxRuntimeEngine
from qdit.engines.probe_check import Probe, SelfTestError, probe_path, read_probe
from qdit.errors import ArtifactError

X = np.array([[1.0, 2.0, 2.0]], np.float32)
PROBE = Probe({"x": X}, {"y": 2 * X}, 1e-4)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """y = x + x."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        "double",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
    )
    path = tmp_path / "model.onnx"
    opsets = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def test_a_probe_is_read_as_it_was_written(model: Path) -> None:
    assert probe_path(model).name == "model.probe.safetensors"
    assert read_probe(model) is None
    PROBE.write(probe_path(model))
    found = read_probe(model)
    assert found is not None
    np.testing.assert_array_equal(found.inputs["x"], X)
    np.testing.assert_array_equal(found.outputs["y"], 2 * X)
    assert found.tolerance == 1e-4


@pytest.mark.parametrize(
    ("made", "error"),
    [
        # ‖(2, 4, 4)‖ = 6; a difference of (0, 0, 0.6) is a tenth of it
        pytest.param({"y": 2 * X + np.array([[0, 0, 0.6]])}, 0.1, id="off"),
        pytest.param({"y": 2 * X}, 0.0, id="equal"),
        pytest.param({"y": np.full_like(X, np.nan)}, np.inf, id="not a number"),
        pytest.param({}, np.inf, id="missing"),
        pytest.param({"y": X[:, :2]}, np.inf, id="another shape"),
    ],
)
def test_the_error_is_relative(made: dict[str, np.ndarray], error: float) -> None:
    assert PROBE.error_of(made) == pytest.approx(error, rel=1e-6)


def test_an_engine_whose_numbers_hold_is_opened(model: Path) -> None:
    PROBE.write(probe_path(model))
    engine = OnnxRuntimeEngine(model)
    np.testing.assert_array_equal(engine.infer({"x": X})["y"], 2 * X)


def test_an_engine_whose_numbers_are_off_is_refused_with_provider_and_version(model: Path) -> None:
    replace(PROBE, outputs={"y": 2.001 * X}).write(probe_path(model))
    import onnxruntime

    with pytest.raises(
        SelfTestError,
        match=rf"ONNX Runtime {onnxruntime.__version__} computes .*model\.onnx wrong with "
        r"CPUExecutionProvider: 0\.0005 from .*, at most 0\.0001 is rounding",
    ):
        OnnxRuntimeEngine(model)
    OnnxRuntimeEngine(model, self_test=False)
    OnnxRuntimeEngine(model, extra_outputs=["y"])  # whoever looks inside compares by himself


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.write_bytes(b"no tensors"), id="bytes"),
        pytest.param(lambda path: replace(PROBE, tolerance=2.0).write(path), id="tolerance"),
        pytest.param(lambda path: replace(PROBE, inputs={}).write(path), id="inputs"),
        pytest.param(lambda path: replace(PROBE, outputs={}).write(path), id="outputs"),
    ],
)
def test_a_damaged_probe_is_no_probe(model: Path, damage: object) -> None:
    damage(probe_path(model))  # type: ignore[operator]
    with pytest.raises(ArtifactError, match=r"model\.probe\.safetensors is not a probe of this"):
        OnnxRuntimeEngine(model)
