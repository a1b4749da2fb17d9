"""Profiles: what is read of them, and how they are shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from qdit.engines.benchmark.operator_times import OperatorTime, from_onnxruntime, from_torch
from qdit.engines.benchmark.profile_view import OTHER, most_of, profile_table, write_profile_plot
from qdit.engines.benchmark.results import BenchmarkResults, Row


def _event(name: str, operator: str, microseconds: int) -> dict[str, object]:
    return {"cat": "Node", "name": name, "dur": microseconds, "args": {"op_name": operator}}


def test_kinds_are_sums_of_their_nodes_medians_without_the_warm_up(tmp_path: Path) -> None:
    runs = [
        # warm-up, then 1, 3 and 40 ms: the median is 3
        *(_event("a_kernel_time", "MatMul", us) for us in (90_000, 1000, 3000, 40_000)),
        *(_event("b_kernel_time", "MatMul", us) for us in (90_000, 2000, 2000, 2000)),
        *(_event("c_kernel_time", "Add", us) for us in (1, 500, 500, 500)),
        _event("c_fence_before", "Add", 10**6),
        {"cat": "Session", "name": "model_run", "dur": 10**6, "args": {}},
    ]
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(runs))
    assert from_onnxruntime(path, 1) == [
        OperatorTime("MatMul", 5.0, 2),
        OperatorTime("Add", 0.5, 1),
    ]


def test_torch_operators_are_counted_a_call() -> None:
    x = torch.randn(64, 64)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(4):
            x @ x
            x @ x
    times = {t.operator: t for t in from_torch(profiler.key_averages(), 4, on_gpu=False)}
    assert times["aten::mm"].count == 2
    assert times["aten::mm"].ms > 0


def test_many_kinds_are_shown_as_a_few_and_the_rest() -> None:
    times = [OperatorTime(f"op{i}", 10.0 - i, 1) for i in range(10)]
    shown = most_of(times)
    assert [entry.operator for entry in shown] == [*(f"op{i}" for i in range(8)), OTHER]
    assert shown[-1] == OperatorTime(OTHER, 3.0, 2)
    assert most_of(times[:8]) == times[:8]


@pytest.fixture
def results() -> BenchmarkResults:
    rows = [
        Row("fp32", 1, profile=[OperatorTime("MatMul", 3.0, 4), OperatorTime("Add", 1.0, 2)]),
        Row("silent", 1),
    ]
    return BenchmarkResults({"summary": "a machine"}, "qdit-bench", rows)


def test_the_table_has_shares(results: BenchmarkResults) -> None:
    table = profile_table(results.rows[0])
    assert table.title == "fp32, batch 1: 4 ms"
    assert list(table.columns[0].cells) == ["MatMul", "Add"]
    assert list(table.columns[3].cells) == ["75.0 %", "25.0 %"]


def test_the_plot_names_targets_and_kinds(results: BenchmarkResults, tmp_path: Path) -> None:
    path = tmp_path / "x.profile.svg"
    write_profile_plot(results, path)
    text = path.read_text()
    assert all(f"<!-- {word} -->" in text for word in ("fp32", "MatMul", "Add"))
    assert "<!-- silent -->" not in text


def test_the_json_has_them(results: BenchmarkResults) -> None:
    first, second = results.to_json()["results"]
    assert first["profile"][0] == {"operator": "MatMul", "ms": 3.0, "count": 4}
    assert second["profile"] is None
