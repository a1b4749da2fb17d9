"""Writing: one file or two, checked, and nothing half done."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from qdit.errors import StepError
from qdit.export.inline import _varint
from qdit.export.write import ExportedModel, write_model
from qdit.progress import Silent

_TEXT = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[batch, 32] x) => (float[batch, 64] y) {
  h = MatMul(x, w)
  y = Add(h, b)
}
"""


def _model(seed: int = 0) -> ir.Model:
    model = ir.from_proto(onnx.parser.parse_model(_TEXT))
    rng = np.random.default_rng(seed)
    for name, shape in (("w", (32, 64)), ("b", (64,))):
        value = next(v for node in model.graph for v in node.inputs if v.name == name)
        value.const_value = ir.tensor(rng.normal(size=shape).astype(np.float32), name=name)
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        model.graph.register_initializer(value)
    return model


def _write(model: ir.Model, path: Path, limit: int = 2**31) -> ExportedModel:
    return write_model(model, path, dtype="float32", progress=Silent(), inline_limit=limit)


def _run(path: Path) -> np.ndarray:
    x = np.ones((2, 32), np.float32)
    (y,) = onnxruntime.InferenceSession(str(path)).run(None, {"x": x})
    return y


def _expected(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    w, b = (rng.normal(size=shape).astype(np.float32) for shape in ((32, 64), (64,)))
    return np.ones((2, 32), np.float32) @ w + b


@pytest.mark.parametrize("limit", [2**31, 100], ids=["one file", "external data"])
def test_runs_and_reads_back(limit: int, tmp_path: Path) -> None:
    exported = _write(_model(), tmp_path / "model.onnx", limit)
    np.testing.assert_allclose(_run(exported.path), _expected(), rtol=1e-5)
    files = sorted(file.name for file in tmp_path.iterdir())
    if limit == 100:
        assert files == ["model.onnx", "model.onnx.data"]
        assert exported.data_path == tmp_path / "model.onnx.data"
    else:
        assert files == ["model.onnx"]
        assert exported.data_path is None
    assert exported.byte_size == sum(file.stat().st_size for file in tmp_path.iterdir())


def test_initializers_have_their_shape_once(tmp_path: Path) -> None:
    """quantize_dynamic transposes some, and onnx then compares with what value_info says."""
    graph = onnx.load(_write(_model(), tmp_path / "model.onnx").path).graph
    assert {tensor.name for tensor in graph.initializer} == {"w", "b"}
    assert not {value.name for value in graph.value_info} & {"w", "b"}


def test_one_file_equals_what_protobuf_would_write(tmp_path: Path) -> None:
    """The streamed bytes parse into the very message, field by field."""
    streamed = onnx.load(_write(_model(), tmp_path / "a.onnx").path)
    external = onnx.load(_write(_model(), tmp_path / "b.onnx", 100).path)
    for tensor in external.graph.initializer:
        del tensor.external_data[:]
        tensor.ClearField("data_location")
    assert streamed == external


@pytest.mark.parametrize(
    ("value", "data"),
    # 300 = 0b10_0101100 → 0101100 with the top bit set, then 10
    [(0, b"\x00"), (127, b"\x7f"), (128, b"\x80\x01"), (300, b"\xac\x02")],
)
def test_varints(value: int, data: bytes) -> None:
    assert _varint(value) == data


def test_replaces_an_older_model_and_its_data(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    _write(_model(seed=1), path, 100)
    _write(_model(), path, 100)
    np.testing.assert_allclose(_run(path), _expected(), rtol=1e-5)
    _write(_model(seed=1), path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    np.testing.assert_allclose(_run(path), _expected(seed=1), rtol=1e-5)


def test_an_error_leaves_the_older_model(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    _write(_model(), path)
    broken = _model(seed=1)
    broken.graph[0].op_type = "NoSuchOperator"
    with pytest.raises(StepError, match="the ONNX checker refuses the exported model"):
        _write(broken, path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    np.testing.assert_allclose(_run(path), _expected(), rtol=1e-5)


def test_a_wrong_shape_is_refused(tmp_path: Path) -> None:
    model = _model()
    model.graph.outputs[0].shape = ir.Shape(["batch", 63])
    with pytest.raises(StepError, match="the ONNX checker refuses"):
        _write(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_other_domains_are_refused(tmp_path: Path) -> None:
    model = _model()
    model.graph[0].domain = "com.microsoft"
    with pytest.raises(StepError, match=r"functions of its own only, got com\.microsoft::MatMul"):
        _write(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


_KILLED = """
import os, sys
from pathlib import Path
from qdit.export.passes import spool_initializers
spool_initializers.SMALLEST_SPOOLED = 1
spool_initializers._in_memory = spool_initializers.SpoolInitializersPass._append = (
    lambda *arguments: os._exit(9)
)
sys.path.insert(0, {tests!r})
import test_write
test_write._write(test_write._model(), Path({path!r}), 100)
"""


def test_a_kill_leaves_nothing_that_looks_like_a_model(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    program = _KILLED.format(tests=str(Path(__file__).parent), path=str(path))
    killed = subprocess.run([sys.executable, "-c", program], check=False)
    assert killed.returncode == 9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".model.onnx.")
    assert left.name.endswith(".partial")
    _write(_model(), path)  # the next run takes away what the killed one left
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_the_folder_of_a_running_export_stays(tmp_path: Path) -> None:
    other = tmp_path / f".model.onnx.{os.getppid()}.partial"
    other.mkdir()
    _write(_model(), tmp_path / "model.onnx")
    assert other.is_dir()
