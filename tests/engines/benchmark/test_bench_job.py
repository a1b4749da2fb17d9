"""The whole of `qdit-bench` on a small random DiT, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qdit.calibrate.sources import load_model
from qdit.engines.bench_job import check_scheme_flags, run_bench
from qdit.engines.benchmark import rounds
from qdit.engines.benchmark.registry import Registration
from qdit.engines.benchmark.results import BenchmarkResults, Row
from qdit.engines.benchmark.subjects import ExportedSubject, ModelSubject
from qdit.engines.options import SchemeOptions
from qdit.errors import InputError, StepError
from qdit.progress import Silent

SMALL = "random:DiT-S/8"  # 16 tokens of 384 channels
SCHEME = SchemeOptions(bits="w4a8", group_size=64)


def bench(
    source: str, scheme: SchemeOptions, targets: tuple[str, ...], **options: object
) -> BenchmarkResults:
    defaults: dict[str, object] = {
        "batches": (2, 1), "runs": 2, "seconds": 0.0, "threads": 1, "device": "cpu",
        "command": "qdit-bench …", "progress": Silent(),
    }  # fmt: skip
    return run_bench(source, scheme, targets=targets, **(defaults | options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `qdit-export` leaves it, without report."""
    work = tmp_path_factory.mktemp("exported")
    subject = ModelSubject(SMALL, SCHEME.plan_for, 1, 0, "cpu", work, Silent())
    folder = subject.quantized_folder()
    for file in subject.qdq_file().parent.iterdir():
        file.rename(folder / file.name)
    return folder


TARGETS_RUN = (
    "fp32", "qdq", "qdq-packed", "onnxruntime", "torch", "torch-simulation", "ort-dynamic"
)  # fmt: skip


@pytest.fixture(scope="module")
def json_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results") / "bench.json"


@pytest.fixture(scope="module")
def results(json_file: Path) -> BenchmarkResults:
    return bench(SMALL, SCHEME, TARGETS_RUN, blocks=1, json_file=json_file, profile=True)


def test_every_target_runs_the_same_model(results: BenchmarkResults) -> None:
    assert [(row.batch, row.target) for row in results.rows] == [
        (batch, target) for batch in (1, 2) for target in TARGETS_RUN
    ]
    rows = {row.target: row for row in results.rows if row.batch == 2}
    assert [row.error for row in rows.values()] == [None] * len(TARGETS_RUN)
    difference = {name: row.relative_difference_to_first or 0.0 for name, row in rows.items()}
    # the same float32 model in two runtimes: some hundred roundings of 2^-24
    assert difference["torch"] < 1e-5
    # quantized by nearest at 4 bits: some percent off, by the simulation and by the file alike
    assert 0.005 < difference["qdq"] < 0.5
    assert difference["qdq-packed"] == pytest.approx(difference["qdq"], rel=0.02)
    assert difference["onnxruntime"] == pytest.approx(difference["qdq"], rel=0.02)
    # 8 bits a tensor: another quantization, but of the same model
    assert 0.001 < difference["ort-dynamic"] < 0.5
    assert difference["torch-simulation"] == pytest.approx(difference["qdq"], rel=0.02)


def test_json_and_plot_are_written(results: BenchmarkResults, json_file: Path) -> None:
    written = json.loads(json_file.read_text("utf-8"))
    assert len(written["results"]) == 2 * len(TARGETS_RUN)
    assert written["settings"]["plan"]["bits"] == "w4a8"
    assert written["settings"]["threads"] == 1
    assert json_file.with_suffix(".svg").stat().st_size > 1000
    assert json_file.with_suffix(".profile.svg").stat().st_size > 1000


def test_a_run_that_is_interrupted_leaves_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = rounds._measure_batch, []

    def interrupted(*arguments: Any) -> list[Row]:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(rounds, "_measure_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench(SMALL, SCHEME, ("torch",), blocks=1, json_file=tmp_path / "bench.json")
    written = json.loads((tmp_path / "bench.json").read_text("utf-8"))
    assert [row["batch"] for row in written["results"]] == [1]
    assert written["settings"]["batches"] == [1, 2]


def test_profiles_name_the_operators_of_each_target(results: BenchmarkResults) -> None:
    kinds = {
        row.target: {entry.operator for entry in row.profile or []}
        for row in results.rows
        if row.batch == 1
    }
    assert "MatMulNBits" in kinds["onnxruntime"]  # adaLN's, whatever products the others are by
    assert "MatMul" in kinds["fp32"]
    assert any("addmm" in kind for kind in kinds["torch"])


def test_the_target_that_has_a_choice_of_products_says_which_it_took(
    results: BenchmarkResults, json_file: Path
) -> None:
    said = {row.target: row.products for row in results.rows}
    assert [target for target, line in said.items() if line is not None] == ["onnxruntime"]
    ours = (said["onnxruntime"] or "").startswith("qdit's own products by ")
    profiles = [row.profile or [] for row in results.rows if row.target == "onnxruntime"]
    for profile in profiles:
        assert ours == any(entry.operator == "GroupwiseMatMul" for entry in profile)
    theirs = (said["onnxruntime"] or "").startswith("ONNX Runtime's own products: ")
    assert ours != theirs
    written = json.loads(json_file.read_text("utf-8"))
    assert written["settings"]["cpu_kernels"] == "auto"
    assert {row["target"]: row["products"] for row in written["results"]} == said


def test_products_that_are_asked_for_are_taken() -> None:
    results = bench(
        SMALL, SCHEME, ("onnxruntime",), blocks=1, batches=(1,), cpu_kernels="onnxruntime"
    )
    assert results.rows[0].products == "ONNX Runtime's own products: they were asked for"


def test_a_choice_of_products_that_nothing_would_read_is_refused() -> None:
    with pytest.raises(InputError, match="--cpu-kernels is read by onnxruntime, got --targets fp"):
        bench(SMALL, SCHEME, ("fp32", "qdq"), cpu_kernels="qdit")
    with pytest.raises(InputError, match="CPU kernels are one of auto, qdit, onnxruntime, got 'x"):
        bench(SMALL, SCHEME, ("onnxruntime",), cpu_kernels="x")


def test_file_bytes_are_those_of_the_weights(results: BenchmarkResults) -> None:
    parameters = 4 * load_model(SMALL, blocks=1).parameter_count()
    bytes_of = {row.target: row.file_bytes or 0 for row in results.rows}
    # beside the parameters: the position table, here 16 tokens of 384, and the graph
    assert 0 <= bytes_of["torch"] - parameters <= 4 * 16 * 384
    assert 0 <= bytes_of["fp32"] - parameters <= 500_000
    assert 0 < bytes_of["torch-simulation"] < bytes_of["qdq"] < bytes_of["fp32"]
    assert 0 < bytes_of["onnxruntime"] < bytes_of["fp32"] / 2
    assert 0 < bytes_of["ort-dynamic"] < bytes_of["fp32"] / 2


def test_an_exported_folder_is_timed_with_the_model_that_it_names(exported: Path) -> None:
    results = bench(str(exported), SchemeOptions(), ("qdq",), batches=(1,))
    (row,) = results.rows
    assert row.error is None
    assert results.settings["plan"]["bits"] == "w4a8"


def test_without_its_source_only_the_quantized_targets_of_a_folder_run(
    exported: Path, tmp_path: Path
) -> None:
    manifest = exported / "qdit.json"
    kept = manifest.read_text("utf-8")
    manifest.write_text(kept.replace(SMALL, "/gone/model"), "utf-8")
    try:
        results = bench(str(exported), SchemeOptions(), ("torch", "qdq"), batches=(1,))
    finally:
        manifest.write_text(kept, "utf-8")
    eager, qdq = results.rows
    assert eager.error is not None
    assert "'/gone/model', cannot be loaded: no model at '/gone/model'" in eager.error
    assert qdq.error is None


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        pytest.param(
            SchemeOptions(bits="w8a8"), {}, r"own plan \(w4a8\), got --bits", id="other bits"
        ),
        pytest.param(
            SchemeOptions(group_size=64), {}, "got --group-size; leave scheme flags out", id="group"
        ),
        pytest.param(SchemeOptions(), {"blocks": 1}, "--blocks shortens a model", id="blocks"),
    ],
)
def test_flags_that_an_exported_folder_cannot_follow_are_refused(
    exported: Path, scheme: SchemeOptions, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        bench(str(exported), scheme, ("qdq",), **options)


def test_the_folders_own_bits_may_be_named(exported: Path) -> None:
    check_scheme_flags(ExportedSubject(exported, seed=0), SchemeOptions(bits="w4a8"))


def test_a_run_without_any_figure_is_a_failure_and_still_writes_json(
    fakes: Callable[..., list[Registration]], tmp_path: Path
) -> None:
    fakes("FailsToLoad")
    with pytest.raises(StepError, match="no target could be timed: FailsToLoad failed at batch 1"):
        bench(SMALL, SCHEME, ("FailsToLoad",), blocks=1, json_file=tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text("utf-8"))["results"][0]["error"]


def test_torch_compile_without_a_compiler_says_what_to_install(
    fakes: Callable[..., list[Registration]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    fakes("Plain")
    results = bench(SMALL, SCHEME, ("torch-compile", "Plain"), blocks=1, batches=(1,))
    compiled, plain = results.rows
    assert compiled.error is not None
    assert "install g++ or clang++" in compiled.error
    assert plain.error is None


def test_bfloat16_is_the_model_in_three_digits() -> None:
    results = bench(SMALL, SCHEME, ("torch", "torch-bf16"), blocks=1, batches=(2,))
    full, half = results.rows
    assert (full.error, half.error) == (None, None)
    assert 1e-4 < (half.relative_difference_to_first or 0.0) < 2e-2
    assert half.file_bytes == (full.file_bytes or 0) // 2


def test_the_cuda_kernels_need_a_gpu() -> None:
    results = bench(SMALL, SCHEME, ("torch", "torch-quantized"), blocks=1, batches=(1,))
    assert results.rows[1].error is not None
    assert "torch-quantized runs CUDA kernels, got --device cpu" in results.rows[1].error


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_cuda_kernels_are_the_simulation_on_a_gpu() -> None:
    targets = ("torch-simulation", "torch-quantized")
    results = bench(SMALL, SCHEME, targets, blocks=1, batches=(2,), device="cuda")
    simulated, quantized = results.rows
    assert quantized.error is None
    assert (quantized.relative_difference_to_first or 1.0) < 5e-3
    assert simulated.error is None
