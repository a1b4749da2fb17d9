"""Figures, ratios, the JSON form that the issue fixes, the table and the plot."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from qdit.engines.benchmark.plot import write_plot
from qdit.engines.benchmark.results import BenchmarkResults, Latency, Row
from qdit.engines.benchmark.table import (
    failures,
    print_results,
    products,
    results_table,
    size,
    three_digits,
)


@pytest.fixture
def results() -> BenchmarkResults:
    rows = [
        Row("fp32", 1, Latency(40.0, 39.0, 44.0, 5), 2_000_000_000, 1_000_000_000),
        Row("qdq", 1, Latency(10.0, 9.5, 12.0, 5), 500_000_000, 250_000_000),
        Row("torch-compile", 1, error="torch.compile needs a C++ compiler"),
        Row("fp32", 8, Latency(200.0, 190.0, 210.0, 5), 3_000_000_000, 1_000_000_000),
        Row("qdq", 8, Latency(400.0, 380.0, 500.0, 5), 600_000_000, 250_000_000),
        Row("torch-compile", 8, error="torch.compile needs a C++ compiler"),
    ]
    settings = {"model": "random:DiT-XL/2", "plan": {"bits": "w4a8"}}
    return BenchmarkResults({"summary": "a machine"}, "qdit-bench …", rows, settings)


def test_a_line_a_target_says_what_multiplied(
    results: BenchmarkResults, capsys: pytest.CaptureFixture[str]
) -> None:
    for row in results.rows:
        if row.target == "qdq":
            row.products = "qdit's own products by AMX (28 nodes)"
    line = "qdq: qdit's own products by AMX (28 nodes)"
    assert products(results) == [line]
    print_results(results)
    assert capsys.readouterr().out.count(line) == 1


def test_latency_statistics_agree_with_numpy() -> None:
    seconds = [0.004, 0.001, 0.0035, 0.002]
    latency = Latency.of(seconds)
    assert latency.median == pytest.approx(1000 * float(np.median(seconds)))
    assert (latency.min, latency.max, latency.runs) == (1.0, 4.0, 4)


def test_ratios_compare_with_the_first_target_of_the_same_batch(results: BenchmarkResults) -> None:
    by_row = {(row.target, row.batch): row for row in results.rows}
    assert results.speedup(by_row["qdq", 1]) == 4.0  # 40 ms / 10 ms
    assert results.speedup(by_row["qdq", 8]) == 0.5  # 200 ms / 400 ms
    assert results.memory_ratio(by_row["qdq", 1]) == 0.25
    assert results.size_ratio(by_row["qdq", 8]) == 0.25
    assert results.speedup(by_row["torch-compile", 1]) is None


def test_there_is_no_ratio_to_a_first_target_that_failed() -> None:
    rows = [Row("fp32", 1, error="no"), Row("qdq", 1, Latency(1.0, 1.0, 1.0, 5), 5, 5)]
    results = BenchmarkResults({"summary": ""}, "", rows)
    assert results.speedup(rows[1]) is results.memory_ratio(rows[1]) is None


def test_the_json_has_the_keys_that_outside_checks_read(
    results: BenchmarkResults, tmp_path: Path
) -> None:
    results.write(tmp_path / "bench.json")
    value = json.loads((tmp_path / "bench.json").read_text("utf-8"))
    assert value.keys() >= {"machine", "command", "results"}
    measured = [row for row in value["results"] if row["error"] is None]
    assert len(measured) == 4
    for row in measured:
        assert row["latency_ms"].keys() == {"median", "min", "max", "runs"}
        assert row["images_per_s"] == pytest.approx(
            1000 * row["batch"] / row["latency_ms"]["median"]
        )
        assert isinstance(row["peak_memory_bytes"], int)
        assert isinstance(row["file_bytes"], int)
    failed = value["results"][2]
    assert failed["error"] == "torch.compile needs a C++ compiler"
    assert failed["latency_ms"] is failed["images_per_s"] is None


def test_the_table_shows_figures_and_ratios(results: BenchmarkResults) -> None:
    console = Console(width=200, record=True)
    console.print(results_table(results))
    lines = console.export_text().splitlines()
    (line,) = (line for line in lines if "qdq" in line and " 10 " in line)
    assert re.split(r"  +", line.strip()) == [
        "1", "qdq", "10", "9.5 … 12", "5", "100", "4.00×", "500.0 MB 0.25×", "250.0 MB 0.25×",
    ]  # fmt: skip
    assert sum("failed" in line for line in lines) == 2


def test_a_target_that_failed_is_named_once(
    results: BenchmarkResults, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "torch-compile failed at batch 1: torch.compile needs a C++ compiler"
    assert failures(results) == [line]
    print_results(results)
    assert capsys.readouterr().out.count(line) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (three_digits(1234.5), "1234"),
        (three_digits(99.96), "100"),
        (three_digits(0.01234), "0.0123"),
        (size(2_702_000_000), "2.70 GB"),
        (size(12_340_000), "12.3 MB"),
        (size(None), "–"),
    ],
)
def test_numbers_are_short(text: str, expected: str) -> None:
    assert text == expected


def test_the_plot_is_an_svg_of_the_same_bytes_every_time(
    results: BenchmarkResults, tmp_path: Path
) -> None:
    write_plot(results, tmp_path / "one.svg")
    write_plot(results, tmp_path / "two.svg")
    root = ElementTree.parse(tmp_path / "one.svg").getroot()
    assert root.tag.endswith("}svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
