"""Real worker processes with stand-in targets: turns, failures, memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdit.engines.benchmark.registry import Registration
from qdit.engines.benchmark.results import Row
from qdit.engines.benchmark.rounds import MOST_RUNS, Schedule, measure, relative_difference
from qdit.engines.benchmark.target import RunSettings
from qdit.progress import Silent

Fakes = Callable[..., list[Registration]]


@pytest.fixture
def run(subject: Any, tmp_path: Path) -> Callable[..., list[Row]]:
    def measured(chosen: Sequence[Registration], **schedule: Any) -> list[Row]:
        work = tmp_path / "work"
        work.mkdir()
        plan = Schedule(**{"batches": (1,), "runs": 3, "seconds": 0.0} | schedule)
        return measure(chosen, subject, plan, RunSettings("cpu", 1), work, Silent())

    return measured


def test_targets_take_turns_in_the_order_asked_for(
    fakes: Fakes, run: Callable[..., list[Row]], tmp_path: Path
) -> None:
    run(fakes("Plain", "Slower", "Chatty"))
    log = (tmp_path / "work" / "log").read_text("utf-8").split()
    warm_up = ["Plain"] * 2 + ["Slower"] * 2 + ["Chatty"] * 2
    # quick targets run once untimed before each timed run: the others emptied the caches
    turns = ["Plain", "Plain", "Slower", "Slower", "Chatty", "Chatty"] * 3
    assert log == warm_up + turns


def test_rows_come_by_batch_then_by_target_with_all_figures(
    fakes: Fakes, run: Callable[..., list[Row]], subject: Any
) -> None:
    rows = run(fakes("Slower", "Plain"), batches=(1, 4))
    assert [(row.batch, row.target) for row in rows] == [
        (1, "Slower"), (1, "Plain"), (4, "Slower"), (4, "Plain"),
    ]  # fmt: skip
    for row in rows:
        assert row.error is None
        assert row.latency is not None
        assert row.latency.runs == 3
        assert row.latency.min <= row.latency.median <= row.latency.max
        assert row.file_bytes == 1000
        assert row.device == "cpu"
        assert row.peak_memory_bytes is not None
        assert row.peak_memory_bytes > 5_000_000  # an interpreter with numpy
    # time.sleep never wakes early (its documented guarantee since Python 3.5)
    assert min(row.latency.min for row in rows if row.target == "Slower" and row.latency) >= 30
    assert subject.released


def test_finished_batch_sizes_are_handed_on_before_the_next(
    fakes: Fakes, subject: Any, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    seen = []

    def so_far(rows: list[Row]) -> None:
        timed = [row.batch for row in rows if row.latency is not None]
        seen.append((timed, len(log.read_text("utf-8").split())))

    plan = Schedule(batches=(1, 4), runs=3, seconds=0.0)
    measure(fakes("Slower"), subject, plan, RunSettings("cpu", 1), tmp_path, Silent(), so_far)
    runs = len(log.read_text("utf-8").split())
    assert seen == [([1], runs // 2), ([1, 4], runs)]


def test_outputs_are_compared_with_the_first_target(
    fakes: Fakes, run: Callable[..., list[Row]]
) -> None:
    first, second = run(fakes("Plain", "Slower"))
    assert first.relative_difference_to_first == 0
    # |2.5x − 2x| / |2x|
    assert second.relative_difference_to_first == pytest.approx(0.25)


def test_a_target_without_files_counts_the_weights_it_holds(
    fakes: Fakes, run: Callable[..., list[Row]]
) -> None:
    (row,) = run(fakes("HasNoFiles"))
    assert row.file_bytes == 10


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("FailsToPrepare", "no such model; name another"),
        ("FailsToLoad", "ImportError: No module named 'runtime'"),
        ("FailsToRun", "RuntimeError: the product is undefined"),
        ("Exits", "the worker died during bind: exit code 7, cannot continue"),
        (
            "DiesInTheThirdTurn",
            "the worker died during run: killed by the system (SIGKILL), most likely out of memory",
        ),
    ],
)
def test_a_failing_target_costs_only_its_own_rows(
    fakes: Fakes, run: Callable[..., list[Row]], name: str, error: str
) -> None:
    rows = run(fakes(name, "Plain"), batches=(1, 2))
    assert [row.error for row in rows] == [error, None, error, None]
    assert [row.latency is None for row in rows] == [True, False, True, False]


def test_peak_memory_is_the_targets_own(fakes: Fakes, run: Callable[..., list[Row]]) -> None:
    plain, holding = run(fakes("Plain", "HoldsMemory"))
    difference = (holding.peak_memory_bytes or 0) - (plain.peak_memory_bytes or 0)
    # the array is made anew before the old one is dropped: one to two of them, and small change
    assert 200e6 * 0.95 < difference < 400e6 * 1.05


def test_what_a_library_prints_does_not_disturb(
    fakes: Fakes, run: Callable[..., list[Row]]
) -> None:
    (row,) = run(fakes("Chatty"))
    assert row.error is None


@pytest.mark.parametrize(
    ("rounds", "elapsed", "goes_on"),
    [
        pytest.param(0, 0.0, True, id="first"),
        pytest.param(4, 99.0, True, id="fewest runs come before the budget"),
        pytest.param(5, 9.9, True, id="budget left"),
        pytest.param(5, 10.0, False, id="budget used up"),
        pytest.param(MOST_RUNS, 1.0, False, id="most runs"),
    ],
)
def test_rounds_go_on(rounds: int, elapsed: float, goes_on: bool) -> None:
    assert Schedule((1,), runs=5, seconds=10.0).goes_on(rounds, elapsed) is goes_on


def test_a_time_budget_adds_runs(fakes: Fakes, run: Callable[..., list[Row]]) -> None:
    (row,) = run(fakes("Plain"), runs=1, seconds=0.5)
    assert row.latency is not None
    assert row.latency.runs > 3


@pytest.mark.parametrize(
    ("output", "reference", "expected"),
    [
        pytest.param([3.0, 4.0], [3.0, 4.0], 0.0, id="equal"),
        pytest.param([0.0, 0.0], [3.0, 4.0], 1.0, id="zero output"),
        pytest.param([1.0], [0.0], None, id="zero reference"),
        pytest.param([np.nan], [1.0], None, id="not a number"),
    ],
)
def test_relative_difference(
    output: list[float], reference: list[float], expected: float | None
) -> None:
    assert relative_difference(np.array(output), np.array(reference)) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: /proc/self/clear_refs")
def test_the_peak_can_be_reset() -> None:
    from qdit.engines.benchmark.memory import PeakMemory

    meter = PeakMemory()
    np.ones(25_000_000)
    high = meter.peak()
    meter.reset()
    if meter.peak() == high:
        pytest.skip("this kernel or sandbox does not let a process reset its peak")
    assert high - meter.peak() > 150e6
