"""Measuring single linears: real numbers, a cache that survives, and nothing measured twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qdit.calibrate.schemes import LayerScheme
from qdit.calibrate.search.latency import LatencyKey, LatencyTable
from qdit.calibrate.simulate import QuantizedLinear
from qdit.engines import latency_bench
from qdit.engines.benchmark.target import RunSettings
from qdit.engines.latency_bench import hardware_name, latency_folder, measure_latencies
from qdit.engines.onnxruntime_engine import OnnxRuntimeEngine
from qdit.engines.single_linears import (
    kernel_part,
    linear_contents,
    measure_linear,
    run_part,
)
from qdit.engines.torch_engine.linears import refuse_kernels
from qdit.errors import InputError
from qdit.export.single_linear import export_single_linear


def key(target: str = "qdq", rows: int = 8, k: int = 64, **scheme: object) -> LatencyKey:
    made = LayerScheme(**{"weight_group": 32, "activation_group": 32, **scheme})  # type: ignore[arg-type]
    return LatencyKey(target, rows, k, 48, made)


CASES = {
    "qdq": key(),
    "qdq per token": key(activation_group="token"),
    "qdq asymmetric": key(weight_symmetric=False, activation_symmetric=False),
    "qdq weight-only": key(activation_bits=16),
    "qdq unquantized": key(weight_bits=16, activation_bits=16),
    "onnxruntime": key("onnxruntime"),
    "onnxruntime per token": key("onnxruntime", weight_group="channel", activation_group="token"),
    "torch": key("torch"),
    "torch unquantized": key("torch", weight_bits=16, activation_bits=16),
}


def test_every_kind_of_case_is_measured_and_kept(tmp_path: Path) -> None:
    table = measure_latencies(CASES.values(), threads=1, cache=tmp_path)
    assert all(0 < table.times[case] < 1000 for case in CASES.values())
    (file,) = tmp_path.iterdir()
    assert LatencyTable.read(file).hardware == hardware_name("cpu", 1)


def test_nothing_is_measured_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[LatencyKey] = []

    def count(case: LatencyKey, *_: object) -> float:
        calls.append(case)
        return float(len(calls))

    monkeypatch.setattr(latency_bench, "measure_linear", count)
    first = measure_latencies([key(), key(weight_group="channel")], threads=1, cache=tmp_path)
    # weights are dequantized at load, so both are one case; it takes three rounds, the least counts
    assert len(calls) == 3
    assert set(first.times.values()) == {1.0}
    more = measure_latencies([key(), key(rows=9)], threads=1, cache=tmp_path)
    assert len(calls) == 6
    assert more.times[key()] == 1.0
    measure_latencies([key()], threads=2, cache=tmp_path)  # another hardware: another file
    assert len(calls) == 9
    assert len(list(tmp_path.iterdir())) == 2


def test_what_was_measured_is_kept_when_the_rest_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_at_the_tenth(case: LatencyKey, *_: object) -> float:
        if case.rows == 10:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(latency_bench, "measure_linear", fail_at_the_tenth)
    with pytest.raises(KeyboardInterrupt):
        measure_latencies([key(rows=rows) for rows in range(1, 20)], threads=1, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    assert {case.rows for case in LatencyTable.read(file).times} == set(range(1, 10))


@pytest.mark.parametrize("damage", ["corrupt", "other versions"])
def test_a_cache_that_does_not_hold_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(latency_bench, "measure_linear", lambda *_: 2.0)
    measure_latencies([key()], threads=1, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    if damage == "corrupt":
        file.write_text("{")
    else:
        name = hardware_name("cpu", 1)
        LatencyTable(name, {"torch": "1.0"}, {key(weight_group="channel"): 1.0}).write(file)
    assert measure_latencies([key()], threads=1, cache=tmp_path).times[key()] == 2.0
    assert LatencyTable.read(file).times[key(weight_group="channel")] == 2.0


def test_unknown_targets_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match="measured on qdq, onnxruntime, torch or torch-quantized, got 'tensorrt-plugin'",
    ):
        measure_latencies([key("tensorrt-plugin")], cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_folder_follows_the_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QDIT_CACHE", str(tmp_path))
    assert latency_folder() == tmp_path / "latency"
    monkeypatch.delenv("QDIT_CACHE")
    assert latency_folder() == Path.home() / ".cache" / "qdit" / "latency"


@pytest.mark.parametrize(
    "name",
    ["qdq", "qdq asymmetric", "qdq weight-only", "onnxruntime", "onnxruntime per token"],
)
def test_the_file_measured_computes_the_simulation(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    contents = linear_contents(case)
    path = tmp_path / "linear.onnx"
    export_single_linear(contents, path, rows=case.rows, target=case.target)
    x = torch.randn(case.rows, case.in_features, generator=torch.Generator().manual_seed(1))
    engine = OnnxRuntimeEngine(tmp_path / "linear.onnx", threads=1)
    (output,) = engine.infer({"x": x.numpy()}).values()
    simulated = QuantizedLinear(case.scheme, contents.quantized(), contents.bias)(x)
    np.testing.assert_allclose(output, simulated.numpy(), rtol=1e-5, atol=1e-5)


def test_more_work_takes_longer(tmp_path: Path) -> None:
    # 256 times the products; the least of five, since other processes only ever add time
    settings = RunSettings("cpu", 1)
    small, large = (
        min(measure_linear(key("torch", rows=rows, k=1152), settings, tmp_path) for _ in range(5))
        for rows in (8, 2048)
    )
    assert small < large


KERNEL_SCHEMES = {
    "groups": {},
    "token and channel": {"weight_group": "channel", "activation_group": "token"},
    "asymmetric": {"weight_symmetric": False, "activation_symmetric": False},
    "weight-only": {"activation_bits": 16},
    "unquantized": {"weight_bits": 16, "activation_bits": 16},
}


@pytest.mark.parametrize("scheme", KERNEL_SCHEMES.values(), ids=KERNEL_SCHEMES)
def test_the_part_measured_computes_the_simulation(scheme: dict[str, object]) -> None:
    # on a CPU through the kernels' meaning in torch; a GPU would time the same operands
    case = key("torch-quantized", **scheme)
    x = torch.randn(case.rows, case.in_features, generator=torch.Generator().manual_seed(1))
    made = run_part(kernel_part(case, torch.device("cpu")), x.half())
    assert made.shape == (case.rows, case.out_features)
    if case.scheme.quantizes_weights:
        contents = linear_contents(case)
        wanted = QuantizedLinear(case.scheme, contents.quantized(), contents.bias)(x.half().float())
        np.testing.assert_allclose(made.float(), wanted, rtol=2e-3, atol=2e-3)


def test_kernels_are_not_timed_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="torch-quantized is measured on cuda, got device cpu"):
        measure_latencies([key("torch-quantized")], cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_no_kernel_computes_is_refused_with_its_reason() -> None:
    case = key("torch-quantized", k=288, weight_group=144, activation_group=144)
    spec = linear_contents(case).spec
    assert "multiple of 32, got 144" in (refuse_kernels(spec, case.scheme) or "")
    assert refuse_kernels(spec, case.scheme.weight_only()) is not None
    assert refuse_kernels(linear_contents(key()).spec, key().scheme) is None
    with pytest.raises(InputError, match="multiple of 32, got 144"):
        kernel_part(case, torch.device("cpu"))


def test_how_weights_were_quantized_counts_for_the_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency_bench, "measure_linear", lambda case, *_: case.scheme.weight_bits)
    monkeypatch.setattr(latency_bench, "hardware_name", lambda *_: "a GPU")
    cases = [key("torch-quantized", weight_bits=bits) for bits in (4, 8)]
    table = measure_latencies(cases, device="cuda", cache=tmp_path)
    assert [table.times[case] for case in cases] == [4, 8]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_are_timed_on_a_gpu(tmp_path: Path) -> None:
    cases = [
        key("torch-quantized", rows=256, k=1152, **scheme) for scheme in KERNEL_SCHEMES.values()
    ]
    table = measure_latencies(cases, device="cuda", cache=tmp_path)
    assert all(0 < table.times[case] < 10 for case in cases)
