"""`qdit-export --target onnxruntime-cuda`, end to end on a CPU, and by the CUDA provider."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from qdit.calibrate.checkpoint import QuantizedCheckpoint
from qdit.engines import onnxruntime_engine
from qdit.engines.at_hand import open_engine
from qdit.engines.cuda_session import wants_graphs
from qdit.engines.kinds.kind import EngineSettings
from qdit.engines.onnxruntime_engine import OnnxRuntimeEngine
from qdit.engines.options import ValidateOptions, build_options
from qdit.engines.probe_check import SelfTestError, read_probe
from qdit.engines.report.schema import read_report
from qdit.engines.session_settings import CPU, CUDA
from qdit.engines.targets.onnxruntime_files import ON_CPU, ON_CUDA, file_for
from qdit.engines.targets.onnxruntime_target import as_computed, comparing_providers
from qdit.engines.validate_job import run_validate
from qdit.errors import InputError
from qdit.progress import Silent

from .test_export_targets import export, targets

GROUPED: dict[str, Any] = {"bits": "w4a8", "group_size": 64, "target": "onnxruntime-cuda"}


@pytest.fixture(scope="module")
def exported(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("onnxruntime-cuda")
    export(model_folder, output, **GROUPED)
    return output


@pytest.fixture
def path(exported: Path) -> Path:
    return exported / "onnxruntime-cuda" / "model.onnx"


def _with_provider(patch: pytest.MonkeyPatch) -> None:
    """As an onnxruntime-gpu has it, where no GPU may be."""
    patch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])


class TestExport:
    def test_the_file_is_written_and_recorded(self, exported: Path, path: Path) -> None:
        (entry,) = read_report(exported / "report.json").targets
        assert (entry.name, entry.file) == ("onnxruntime-cuda", "onnxruntime-cuda/model.onnx")
        assert entry.bytes == path.stat().st_size
        assert entry.checked_for.endswith("by CPUExecutionProvider")
        assert entry.requested == {"nbits-float16": 7}
        assert entry.changes == (
            "6 linears leave activations in float16, w4 g64 · a8 g64 → w4 g64 · a16; weights are "
            "the plan's"
        )
        # float16 against float32, and no activation that could round the other way
        assert entry.file_vs_simulation is not None
        assert entry.file_vs_simulation < 2e-3
        page = (exported / "report.html").read_text()
        assert "passed its self-test in ONNX Runtime 1." in page

    def test_it_lies_beside_the_one_for_cpus(self, model_folder: Path, tmp_path: Path) -> None:
        flags = GROUPED | {"target": "onnxruntime,onnxruntime-cuda"}
        both = targets(model_folder, tmp_path, **flags)
        assert [entry.name for entry in both] == ["onnxruntime", "onnxruntime-cuda"]
        assert all((tmp_path / entry.file).is_file() for entry in both)

    def test_its_provider_compares_it_where_the_job_runs_on_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert comparing_providers(ON_CUDA, "cpu") == [CPU]
        _with_provider(monkeypatch)
        assert comparing_providers(ON_CUDA, "cpu") == [CPU]
        assert comparing_providers(ON_CUDA, "cuda:0") == [CUDA, CPU]
        assert comparing_providers(ON_CPU, "cuda:0") == [CPU]


class TestProbe:
    def test_the_tolerance_is_above_rounding_and_below_a_fault(
        self, exported: Path, path: Path
    ) -> None:
        probe = read_probe(path)
        assert probe is not None
        checkpoint = as_computed(QuantizedCheckpoint.read(exported), ON_CUDA)
        half = checkpoint.build_denoiser(dtype=torch.float16)
        names = [spec.name for spec in checkpoint.family.inputs(half)]
        inputs = [torch.from_numpy(probe.inputs[name]) for name in names]
        with torch.inference_mode():
            made = checkpoint.family.forward(half, *inputs).float().numpy()
        assert probe.error_of({checkpoint.family.output_name: made}) == pytest.approx(
            probe.tolerance / 8
        )
        with OnnxRuntimeEngine(path) as engine:
            assert probe.error_of(engine.infer(probe.inputs)) <= probe.tolerance / 4

    def test_a_weight_read_with_swapped_nibbles_is_refused(
        self, path: Path, tmp_path: Path
    ) -> None:
        model = onnx.load(path)
        (weight,) = (
            tensor
            for tensor in model.graph.initializer
            if tensor.name == "transformer_blocks.0.ff.net.0.proj.weight"
        )
        packed = np.frombuffer(weight.raw_data, np.uint8)
        weight.raw_data = ((packed >> 4) | (packed << 4)).astype(np.uint8).tobytes()
        onnx.save(model, tmp_path / "model.onnx")
        probe = path.with_name("model.probe.safetensors")
        (tmp_path / probe.name).write_bytes(probe.read_bytes())
        with pytest.raises(SelfTestError, match="wrong with CPUExecutionProvider"):
            OnnxRuntimeEngine(tmp_path / "model.onnx")

    def test_a_provider_that_cannot_run_the_file_fails_its_test(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As the CUDA provider does at QuantizeLinear in blocks: it loads, and stops in the run."""

        def stop(*_: object) -> None:
            raise RuntimeError("Unsupported quantization type.")

        monkeypatch.setattr(onnxruntime_engine, "_run", stop)
        with pytest.raises(SelfTestError, match=r"cannot run .* by CPU.*Unsupported quantization"):
            OnnxRuntimeEngine(path)


class TestProof:
    def test_the_provider_chooses_the_file(self) -> None:
        assert file_for(CUDA) is ON_CUDA
        assert file_for(CPU) is ON_CPU
        assert file_for("DnnlExecutionProvider") is ON_CPU

    def test_the_cuda_provider_is_the_default_of_its_file(self, exported: Path) -> None:
        if CUDA in onnxruntime.get_available_providers():
            pytest.skip("this ONNX Runtime has the CUDA provider")
        options = build_options(ValidateOptions, {"engine": "onnxruntime-cuda", "device": "cpu"})
        with (
            pytest.MonkeyPatch.context() as patch,
            pytest.raises(InputError, match="has no provider CUDAExecutionProvider"),
        ):
            patch.setattr("qdit.engines.validate_job.load_model", None)  # before any work
            run_validate(exported, options, None, "qdit-validate", Silent())

    def test_a_folder_without_the_file_is_refused(self, exported: Path, tmp_path: Path) -> None:
        for name in ("qdit.json", "weights.safetensors", "model.onnx"):
            (tmp_path / name).write_bytes((exported / name).read_bytes())
        flags = {"engine": "onnxruntime-target", "provider": "cuda", "device": "cpu"}
        options = build_options(ValidateOptions, flags)
        with pytest.raises(
            InputError,
            match=r"holds no onnxruntime-cuda/model\.onnx; export it again with --target "
            "onnxruntime-cuda",
        ):
            run_validate(tmp_path, options, None, "qdit-validate", Silent())

    @pytest.mark.parametrize(
        "provider",
        [
            pytest.param(CPU, id="its operators on the cpu"),
            pytest.param(CUDA, id="cuda", marks=pytest.mark.gpu),
        ],
    )
    def test_every_linear_and_the_denoiser_keep_their_bounds(
        self, exported: Path, provider: str
    ) -> None:
        if provider not in onnxruntime.get_available_providers():
            pytest.skip(f"this ONNX Runtime has no {provider}: install onnxruntime-gpu")
        flags = {"fid_samples": 0, "num_inference_steps": 2, "device": "cpu"}
        flags |= {"engine": "onnxruntime-cuda", "provider": provider}
        options = build_options(ValidateOptions, flags)
        assert run_validate(exported, options, None, "qdit-validate", Silent())
        report = read_report(exported / "report.json")
        assert (report.parity.engine, report.parity.dtype) == ("onnxruntime-cuda", "float16")
        checks = {check.name: check for check in report.parity.checks}
        for name in ("linears_same_input", "denoiser_bound"):
            assert checks[name].outcome == "passed"


class TestKinds:
    def test_a_cpu_takes_the_other_file(self, exported: Path) -> None:
        with pytest.raises(InputError, match="the CUDA provider's; on a CPU use onnxruntime"):
            open_engine(exported, "onnxruntime-cuda", EngineSettings("cpu", 1))

    def test_without_the_provider(self, exported: Path) -> None:
        if CUDA in onnxruntime.get_available_providers():
            pytest.skip("this ONNX Runtime has the CUDA provider")
        with pytest.raises(InputError, match=r"has no CUDAExecutionProvider; install qdit\[gpu\]"):
            open_engine(exported, "onnxruntime-cuda", EngineSettings("cuda"))

    @pytest.mark.parametrize("name", ["onnxruntime", "qdq"])
    def test_files_that_quantize_activations_stay_on_the_cpu(
        self, name: str, exported: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _with_provider(monkeypatch)
        (exported / "onnxruntime").mkdir(exist_ok=True)
        (exported / "onnxruntime" / "model.onnx").write_bytes(
            (exported / "model.onnx").read_bytes()
        )
        with pytest.raises(InputError, match="no 8-bit QuantizeLinear in blocks; export with"):
            open_engine(exported, name, EngineSettings("cuda"))
        # left to itself, it runs where it can and does not try the GPU
        assert open_engine(exported, name, EngineSettings("auto", 1)).kind.name == name


@pytest.mark.parametrize(
    ("options", "wanted"),
    [({}, False), ({"enable_cuda_graph": "1"}, True), ({"enable_cuda_graph": "0"}, False),
     ({"enable_cuda_graph": "True"}, True), ({"use_tf32": "1"}, False)],
)  # fmt: skip
def test_graphs_are_captured_where_asked_for(options: dict[str, str], wanted: bool) -> None:
    assert wants_graphs(options) is wanted


def test_an_option_that_the_provider_does_not_know_is_refused(path: Path) -> None:
    with pytest.raises(InputError, match="options of CPUExecutionProvider are none, got nonsense"):
        OnnxRuntimeEngine(path, provider_options={"nonsense": "1"}, self_test=False)
