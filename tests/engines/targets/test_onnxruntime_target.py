"""`qdit-export --target onnxruntime`, end to end: file, probe, record, report and its proof."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from qdit.calibrate.checkpoint import QuantizedCheckpoint
from qdit.calibrate.plan import LinearSpec, uniform_plan
from qdit.calibrate.schemes import LayerScheme
from qdit.engines.at_hand import open_engine
from qdit.engines.kinds.kind import EngineSettings
from qdit.engines.onnxruntime_engine import OnnxRuntimeEngine
from qdit.engines.options import ValidateOptions, build_options
from qdit.engines.probe_check import SelfTestError, read_probe
from qdit.engines.report.schema import read_report
from qdit.engines.targets.onnxruntime_target import notes_for
from qdit.engines.targets.probe import make_probe
from qdit.engines.validate_job import run_validate
from qdit.errors import InputError
from qdit.progress import Silent

from .test_export_targets import export, options_of, targets

FAST: dict[str, Any] = {
    "bits": "w4a8",
    "group_size": 64,
    "activation_group_size": "token",
    "scale_format": "integer",
    "target": "onnxruntime",
}


@pytest.fixture(scope="module")
def exported(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("onnxruntime")
    export(model_folder, output, **FAST)
    return output


@pytest.fixture
def path(exported: Path) -> Path:
    return exported / "onnxruntime" / "model.onnx"


class TestExport:
    def test_the_file_is_written_and_recorded(self, exported: Path, path: Path) -> None:
        (entry,) = read_report(exported / "report.json").targets
        assert entry.name == "onnxruntime"
        assert entry.file == "onnxruntime/model.onnx"
        assert entry.bytes == path.stat().st_size
        assert entry.checked_for.startswith("ONNX Runtime 1.")
        assert entry.requested == {"int8": 6, "int8-split": 1}
        assert entry.changes == ""
        assert entry.file_vs_simulation is not None
        # the file computes what the simulation does, but for values that round the other way
        assert entry.file_vs_simulation < 5e-3
        page = (exported / "report.html").read_text()
        assert entry.compared_by == ""  # whole rows are no MatMulNBits: there is no choice
        assert "ONNX Runtime loads the file itself" in page
        assert "passed its self-test in ONNX Runtime 1." in page

    def test_file_and_probe_are_among_those_hashed(self, exported: Path) -> None:
        names = {file.name for file in read_report(exported / "report.json").sizes.files}
        assert {"onnxruntime/model.onnx", "onnxruntime/model.probe.safetensors"} <= names

    def test_engines_open_it_and_test_it(self, exported: Path, path: Path) -> None:
        opened = open_engine(exported, settings=EngineSettings("cpu", 1))
        assert opened.kind.name == "onnxruntime"
        probe = read_probe(path)
        assert probe is not None
        assert probe.error_of(opened.engine.infer(probe.inputs)) <= probe.tolerance

    def test_a_second_run_writes_nothing_anew(
        self, exported: Path, path: Path, model_folder: Path
    ) -> None:
        before = path.stat().st_mtime_ns
        targets(model_folder, exported, **FAST)
        assert path.stat().st_mtime_ns == before

    def test_its_own_proof_is_reported(
        self, exported: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flags = {"fid_samples": 0, "num_inference_steps": 2, "device": "cpu"}
        options = build_options(ValidateOptions, flags | {"engine": "onnxruntime-target"})
        run_validate(exported, options, None, "qdit-validate", Silent())
        parity = read_report(exported / "report.json").parity
        assert parity.engine == "onnxruntime-target"
        linears = {linear.name: linear for linear in parity.linears}
        assert len(linears) == 7
        assert all((linear.relative_error or 0) <= 1e-6 for linear in linears.values())

    def test_a_proof_of_a_folder_without_it_is_refused(
        self, exported: Path, tmp_path: Path
    ) -> None:
        for name in ("qdit.json", "weights.safetensors", "model.onnx"):
            (tmp_path / name).write_bytes((exported / name).read_bytes())
        options = build_options(ValidateOptions, {"engine": "onnxruntime-target", "device": "cpu"})
        with pytest.raises(InputError, match=r"holds no onnxruntime/model\.onnx; export it again"):
            run_validate(tmp_path, options, None, "qdit-validate", Silent())


class TestSelfTest:
    def test_a_file_of_other_weights_is_refused(self, path: Path, tmp_path: Path) -> None:
        """As a fault of the runtime would show: one weight of 4 bits read with swapped nibbles."""
        model = onnx.load(path)
        changed = False
        for tensor in model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.INT4 and tensor.name.endswith("0.proj.weight"):
                packed = np.frombuffer(tensor.raw_data, np.uint8)
                tensor.raw_data = ((packed >> 4) | (packed << 4)).astype(np.uint8).tobytes()
                changed = True
        assert changed
        broken = tmp_path / "model.onnx"
        onnx.save(model, broken)
        probe = path.with_name("model.probe.safetensors")
        (tmp_path / probe.name).write_bytes(probe.read_bytes())
        with pytest.raises(SelfTestError, match="wrong with CPUExecutionProvider"):
            OnnxRuntimeEngine(broken)

    def test_the_tolerance_is_above_rounding_and_below_a_fault(
        self, exported: Path, path: Path
    ) -> None:
        probe = read_probe(path)
        assert probe is not None
        checkpoint = QuantizedCheckpoint.read(exported)
        double = checkpoint.build_denoiser(dtype=torch.float64)
        names = [spec.name for spec in checkpoint.family.inputs(double)]
        inputs = [torch.from_numpy(probe.inputs[name]) for name in names]
        with torch.inference_mode():
            made = checkpoint.family.forward(double, *inputs).numpy()
        assert probe.error_of({checkpoint.family.output_name: made}) <= probe.tolerance
        assert 1e-4 <= probe.tolerance <= 0.2

    def test_probes_are_the_same_every_time(self, exported: Path, path: Path) -> None:
        stored = read_probe(path)
        assert stored is not None
        made = make_probe(QuantizedCheckpoint.read(exported), "cpu")
        for name, array in stored.inputs.items():
            np.testing.assert_array_equal(made.inputs[name], array)


class TestOtherPlans:
    def test_finer_activations_are_said(self, model_folder: Path, tmp_path: Path) -> None:
        (entry,) = targets(model_folder, tmp_path, bits="w4a8", group_size=32,
                           activation_group_size=64, target="onnxruntime")  # fmt: skip
        assert entry.compared_by.startswith(("qdit's own products", "ONNX Runtime's own products"))
        assert "quantize activations more finely" in entry.changes
        assert "w4 g32 · a8 g64 → w4 g32 · a8 g32" in entry.changes
        # compared with the simulation of what it computes
        assert entry.file_vs_simulation is not None
        assert entry.file_vs_simulation < 5e-3

    def test_what_asymmetric_activations_cost_is_said(
        self, model_folder: Path, tmp_path: Path
    ) -> None:
        options = options_of(model_folder, tmp_path, bits="w4a8", symmetric=False)
        plan = uniform_plan("w4a8", options.scheme(), _linears())
        (note,) = notes_for(plan, _linears())
        assert "2 linears stay as in model.onnx" in note
        assert "symmetric activations only" in note
        assert "slower than full precision" in note

    def test_a_plan_that_fits_needs_no_words(self) -> None:
        assert notes_for(uniform_plan("w4a8", LayerScheme(), _linears()), _linears()) == ()


def _linears() -> list[LinearSpec]:
    return [LinearSpec(name, "mlp_in", 0, 256, 64, True, f"{name}.input") for name in ("a", "b")]


def test_the_file_holds_four_bits(path: Path) -> None:
    stored = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    weight = stored["transformer_blocks.0.ff.net.2.weight"]
    assert weight.data_type == onnx.TensorProto.INT4
    assert numpy_helper.to_array(weight).size == len(weight.raw_data) * 2
