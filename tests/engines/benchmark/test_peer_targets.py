"""Other libraries' models as targets: what they compute, and what is said where one is absent."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from qdit.calibrate.plan import uniform_plan
from qdit.calibrate.schemes import LayerScheme
from qdit.engines.benchmark.subjects import ModelSubject
from qdit.engines.benchmark.target import Prepared, RunSettings
from qdit.engines.benchmark.targets.onnxruntime_targets import FullPrecision
from qdit.engines.benchmark.targets.peer_targets import OpenVino, OpenVinoInt8, TorchAoInt8
from qdit.errors import InputError
from qdit.progress import Silent

CPU = RunSettings("cpu", 1)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> ModelSubject:
    work = tmp_path_factory.mktemp("peers")
    return ModelSubject(
        "random:DiT-S/8",
        lambda model: uniform_plan("w8a8", LayerScheme(8, 8, 128, 128), model.linears),
        2, 0, "cpu", work, Silent(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def expected(subject: ModelSubject, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    target = FullPrecision()
    runner = target.load(target.prepare(subject, tmp_path_factory.mktemp("full")), CPU)
    runner.bind(subject.inputs(2))
    runner.run()
    return runner.output()


@pytest.mark.parametrize(
    ("library", "target", "least", "most"),
    [
        # bfloat16 has 8 significant bits, and its residual stream rounds in every addition: 6 %
        # on random weights; int8 has a step of 1/127 of the largest value
        pytest.param("openvino", OpenVino, 0.0, 0.15, id="openvino"),
        pytest.param("nncf", OpenVinoInt8, 1e-3, 0.3, id="openvino-int8"),
        pytest.param("torchao", TorchAoInt8, 1e-3, 0.3, id="torchao-int8"),
    ],
)
def test_peers_compute_the_same_model(
    library: str,
    target: type[OpenVino] | type[TorchAoInt8],
    least: float,
    most: float,
    subject: ModelSubject,
    expected: np.ndarray,
    tmp_path: Path,
) -> None:
    pytest.importorskip(library, reason=f"{library} is not installed: pip install qdit[peers]")
    runner = target().load(target().prepare(subject, tmp_path), CPU)
    runner.bind(subject.inputs(2))
    runner.run()
    error = np.linalg.norm(runner.output() - expected) / np.linalg.norm(expected)
    assert least <= error <= most


@pytest.mark.parametrize(
    ("library", "target"), [("openvino", OpenVino), ("torchao.quantization", TorchAoInt8)]
)
def test_an_absent_library_is_named_with_the_way_to_get_it(
    library: str,
    target: type[OpenVino] | type[TorchAoInt8],
    subject: ModelSubject,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    prepared = target().prepare(subject, tmp_path)
    name = library.partition(".")[0]
    with pytest.raises(InputError, match=rf"{name} is not installed: pip install qdit\[peers\]"):
        target().load(prepared, CPU)


def test_openvino_refuses_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run on the CPU, got --device cuda"):
        OpenVino().load(Prepared({"path": str(tmp_path / "model.onnx")}), RunSettings("cuda", 1))
