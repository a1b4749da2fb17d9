"""The engine on a file with our own products: on portable ones, so on any machine."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qdit.engines.cpu_kernels import choice
from qdit.engines.cpu_kernels.build import build_library
from qdit.engines.onnxruntime_engine import OnnxRuntimeEngine
from qdit.engines.options import ValidateOptions
from qdit.engines.probe_check import Probe, SelfTestError, probe_path
from qdit.engines.proof_engine import OnnxRuntimeTargetProof
from qdit.errors import InputError, StepError

from .conftest import Array, model_of, random_linear, random_rows

_LINEAR = random_linear(128, 9, 32, 4, zero_points=True, bias=True)
_X = random_rows(6, 128)


@pytest.fixture(autouse=True)
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose own products are the portable ones."""
    monkeypatch.setattr(choice, "machine_obstacle", lambda: "")
    monkeypatch.setattr(choice, "build_library", partial(build_library, "plain"))
    monkeypatch.setattr(choice, "library_units", lambda library: "plain C")


@pytest.fixture(params=[False, True], ids=["one file", "external data"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A [rows, 128] → y = |2 linear(A)|, by MatMulNBits."""
    model = model_of(_LINEAR, "MatMulNBits")
    graph = model.graph
    graph.node[-1].output[0] = "product"
    graph.node.append(helper.make_node("Add", ["product", "product"], ["doubled"]))
    graph.node.append(helper.make_node("Abs", ["doubled"], ["y"]))
    graph.value_info.append(helper.make_tensor_value_info("product", TensorProto.FLOAT, None))
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=request.param, location="w.bin", size_threshold=64)
    return path


def _infer(path: Path, kernels: choice.CpuKernels = "auto", **settings: object) -> Array:
    engine = OnnxRuntimeEngine(path, kernels=kernels, threads=2, **settings)  # type: ignore[arg-type]
    made: Array = engine.infer({"A": _X})["y"]
    engine.close()
    return made


def test_auto_takes_ours_and_says_so(path: Path) -> None:
    engine = OnnxRuntimeEngine(path)
    assert str(engine.kernels) == "qdit's own products by plain C (1 node)"
    np.testing.assert_array_equal(engine.infer({"A": _X})["y"], _infer(path, "qdit"))
    assert not OnnxRuntimeEngine(path, kernels="onnxruntime").kernels.is_ours


def test_the_numbers_are_those_of_onnx_runtime(path: Path) -> None:
    theirs = _infer(path, "onnxruntime")
    wanted = np.abs(2 * _LINEAR.terms(_X).sum(axis=2))
    for settings in ({}, {"optimize": False}, {"fold_weights": False}):
        ours = _infer(path, **settings)
        assert np.linalg.norm(ours - theirs) <= 1e-6 * np.linalg.norm(theirs)
        assert np.linalg.norm(ours - wanted) <= 1e-6 * np.linalg.norm(wanted)


def test_the_file_stays_what_it_is(path: Path) -> None:
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    _infer(path, "qdit")
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


def test_inner_values_are_returned_as_well(path: Path) -> None:
    engine = OnnxRuntimeEngine(path, kernels="qdit", extra_outputs=["product", "doubled"])
    made = engine.infer({"A": _X})
    np.testing.assert_array_equal(made["doubled"], 2 * made["product"])
    np.testing.assert_array_equal(made["y"], _infer(path, "qdit"))


def test_metadata_is_kept(path: Path) -> None:
    model = onnx.load(path, load_external_data=False)
    model.metadata_props.add(key="qdit.linears", value="{}")
    path.write_bytes(model.SerializeToString())
    assert OnnxRuntimeEngine(path, kernels="qdit").metadata == {"qdit.linears": "{}"}


def test_a_self_test_that_fails_names_them_and_the_way_around(path: Path) -> None:
    right = Probe({"A": _X}, {"y": _infer(path, "onnxruntime")}, 1e-4)
    right.write(probe_path(path))
    OnnxRuntimeEngine(path)
    replace(right, outputs={"y": 1.5 * right.outputs["y"]}).write(probe_path(path))
    with pytest.raises(
        SelfTestError,
        match=r"with qdit's own products by plain C \(1 node\) computes .*use --cpu-kernels "
        "onnxruntime, another version",
    ):
        OnnxRuntimeEngine(path)
    with pytest.raises(SelfTestError, match=r"ONNX Runtime [\d.]+ computes .*; use another"):
        OnnxRuntimeEngine(path, kernels="onnxruntime")


def test_a_failing_call_says_the_rule(path: Path) -> None:
    engine = OnnxRuntimeEngine(path, kernels="qdit")
    with pytest.raises(StepError, match="the last dimension of A must be 128, got 127"):
        engine.infer({"A": _X[:, 1:]})


def test_where_they_cannot_be_had_qdit_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "machine_obstacle", lambda: "this processor has no AVX512-VNNI")
    engine = OnnxRuntimeEngine(path)
    assert str(engine.kernels) == ("ONNX Runtime's own products: this processor has no AVX512-VNNI")
    with pytest.raises(InputError, match="this processor has no AVX512-VNNI") as found:
        OnnxRuntimeEngine(path, kernels="qdit")
    assert found.value.exit_code == 2


def test_a_library_that_onnx_runtime_does_not_take(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(b"no library")
    monkeypatch.setattr(choice, "build_library", lambda: damaged)
    with pytest.raises(StepError, match=r"does not take the operators of .*damaged\.so"):
        OnnxRuntimeEngine(path)


class TestProof:
    def test_its_images_follow_from_what_multiplies(self, path: Path) -> None:
        ours = OnnxRuntimeTargetProof(path, "float32", kernels="qdit")
        theirs = OnnxRuntimeTargetProof(path, "float32", kernels="onnxruntime")
        assert ours.identity() == theirs.identity() | {"products": "plain C"}
        assert ours.open().kernels == ours.products
        assert not theirs.open().kernels.is_ours

    def test_ours_are_refused_before_anything_runs(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(choice, "machine_obstacle", lambda: "this is no such machine")
        with pytest.raises(InputError, match="this is no such machine"):
            OnnxRuntimeTargetProof(path, "float32", kernels="qdit")

    def test_the_flag_is_onnx_runtimes(self) -> None:
        ValidateOptions(engine="onnxruntime-target", cpu_kernels="qdit").check_engine()
        with pytest.raises(InputError, match="--cpu-kernels is read by ONNX Runtime, got --engine"):
            ValidateOptions(engine="torch", cpu_kernels="qdit").check_engine()
