"""Turns: every target runs once a round, A B C A B C …, so that drift hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ...progress import Progress
from .operator_times import OperatorTime
from .registry import Registration
from .results import Latency, Row
from .subject import Subject
from .target import Prepared, RunSettings
from .worker_handle import TargetFailedError, WorkerHandle

# A pool that still spins after its run would take cores from the next target. Measured on two
# cores: libgomp (torch) spins for about 5 ms of CPU time; ONNX Runtime would for tens of ms, which
# its target's session option ends at once.
SETTLE_S = 0.02
MOST_RUNS = 200


@dataclass(frozen=True)
class Schedule:
    """At least `runs` rounds a batch size; more while `seconds` are not used up, at most 200.

    `profile`: then let each target's runtime say where its time goes, in calls that are not timed.
    """

    batches: tuple[int, ...]
    runs: int = 5
    seconds: float = 10.0
    warm_up: int = 2
    profile: bool = False

    def goes_on(self, rounds: int, elapsed_s: float) -> bool:
        """Whether another round follows `rounds` finished ones of one batch size."""
        return rounds < self.runs or (elapsed_s < self.seconds and rounds < MOST_RUNS)


@dataclass
class Lane:
    """One target through the whole benchmark: its worker until it fails, and what it said."""

    registration: Registration
    prepared: Prepared | None = None
    worker: WorkerHandle | None = None
    error: str | None = None
    loaded: dict[str, Any] = field(default_factory=dict)

    def fail(self, error: str) -> None:
        """End the worker; the target has no further figures."""
        self.error = error
        if self.worker is not None:
            self.worker.close()
            self.worker = None


def measure(
    registrations: Sequence[Registration],
    subject: Subject,
    schedule: Schedule,
    settings: RunSettings,
    work: Path,
    progress: Progress,
    so_far: Callable[[list[Row]], None] | None = None,
) -> list[Row]:
    """Prepare, load, warm up and time all targets; rows by batch size, then by target.

    Files go to `work`, each target's own to a folder of its name there. `so_far` is called with
    all finished rows after each batch size: one that takes hours may not end.

    A target that fails anywhere has its error in its rows from there on; the others go on.
    """
    lanes = [Lane(registration) for registration in registrations]
    _prepare(lanes, subject, work, progress)
    inputs = {batch: _write_inputs(subject, batch, work) for batch in schedule.batches}
    subject.release()
    rows: list[Row] = []
    with ExitStack() as workers:
        for lane in progress.track(lanes, "Loading targets", len(lanes)):
            _load(lane, settings, workers)
        for batch in schedule.batches:
            rows += _measure_batch(lanes, batch, inputs[batch], schedule, work, progress)
            if so_far is not None:
                so_far(rows)
    return rows


def _prepare(lanes: Sequence[Lane], subject: Subject, work: Path, progress: Progress) -> None:
    # full precision first: quantizing uses up the loaded model (see Subject)
    ordered = sorted(lanes, key=lambda lane: lane.registration.quantized)
    for lane in progress.track(ordered, "Preparing targets", len(ordered)):
        folder = work / lane.registration.name
        folder.mkdir(parents=True)
        try:
            lane.prepared = lane.registration.load().prepare(subject, folder)
        except Exception as error:  # one target's missing library or file is not the others'
            lane.error = _one_line(error)


def _write_inputs(subject: Subject, batch: int, work: Path) -> Path:
    path = work / f"inputs-{batch}.safetensors"
    save_file(subject.inputs(batch), path)
    return path


def _load(lane: Lane, settings: RunSettings, workers: ExitStack) -> None:
    if lane.prepared is None:
        return
    lane.worker = workers.enter_context(WorkerHandle(lane.registration, settings))
    try:
        lane.loaded = lane.worker.load(lane.prepared)
    except TargetFailedError as error:
        lane.fail(str(error))


def _measure_batch(
    lanes: Sequence[Lane],
    batch: int,
    inputs: Path,
    schedule: Schedule,
    work: Path,
    progress: Progress,
) -> list[Row]:
    rows = [_new_row(lane, batch) for lane in lanes]
    outputs = [work / f"output-{lane.registration.name}-{batch}.npy" for lane in lanes]
    warm_ups = list(zip(lanes, rows, outputs, strict=True))
    for lane, row, output in progress.track(warm_ups, f"Warming up, batch {batch}", len(lanes)):
        if lane.worker is not None:
            _warm_up(lane, row, inputs, output, schedule.warm_up)
    _run_rounds(lanes, rows, schedule, progress)
    if schedule.profile:
        pairs = list(zip(lanes, rows, strict=True))
        for lane, row in progress.track(pairs, f"Profiling, batch {batch}", len(pairs)):
            _profile(lane, row)
    for row, output in zip(rows, outputs, strict=True):
        if output.exists() and outputs[0].exists():
            row.relative_difference_to_first = relative_difference(
                np.load(output), np.load(outputs[0])
            )
    return rows


def _new_row(lane: Lane, batch: int) -> Row:
    loaded = lane.loaded
    file_bytes = None if lane.prepared is None else lane.prepared.file_bytes
    return Row(
        target=lane.registration.name,
        batch=batch,
        file_bytes=loaded.get("weight_bytes") if file_bytes is None else file_bytes,
        error=lane.error,
        device=loaded.get("device"),
        products=loaded.get("products"),
        load_s=loaded.get("seconds"),
        load_peak_memory_bytes=loaded.get("load_peak_memory_bytes"),
    )


def _warm_up(lane: Lane, row: Row, inputs: Path, output: Path, count: int) -> None:
    if lane.worker is None:
        return
    try:
        answer = lane.worker.bind(str(inputs), str(output), count)
        row.first_run_ms = 1000 * answer["first_run_s"]
    except TargetFailedError as error:
        lane.fail(str(error))
        row.error = lane.error


def _run_rounds(
    lanes: Sequence[Lane], rows: Sequence[Row], schedule: Schedule, progress: Progress
) -> None:
    times: list[list[float]] = [[] for _ in lanes]
    rounds, started = 0, time.perf_counter()
    bar = progress.track(range(schedule.runs), f"Timing, batch {rows[0].batch}", schedule.runs)
    while any(lane.worker for lane in lanes) and schedule.goes_on(
        rounds, time.perf_counter() - started
    ):
        next(bar, None)  # extra rounds within the time budget come after a full bar
        for lane, row, seconds in zip(lanes, rows, times, strict=True):
            if lane.worker is not None:
                _turn(lane, row, seconds)
        rounds += 1
    next(bar, None)
    for row, seconds in zip(rows, times, strict=True):
        if seconds and row.error is None:
            row.latency = Latency.of(seconds)


def _turn(lane: Lane, row: Row, seconds: list[float]) -> None:
    if lane.worker is None:
        return
    time.sleep(SETTLE_S)
    try:
        answer = lane.worker.run()
    except TargetFailedError as error:
        lane.fail(str(error))
        row.error = lane.error
        return
    seconds.append(answer["seconds"])
    row.peak_memory_bytes = answer["peak_memory_bytes"]
    row.peak_device_memory_bytes = answer["peak_device_memory_bytes"]


def _profile(lane: Lane, row: Row) -> None:
    if lane.worker is None:
        return
    try:
        found = lane.worker.profile()
    except TargetFailedError as error:
        lane.fail(str(error))  # its timings stay: only the profile is missing
        return
    row.profile = None if found is None else [OperatorTime(**entry) for entry in found]


def relative_difference(output: np.ndarray, reference: np.ndarray) -> float | None:
    """‖output − reference‖ / ‖reference‖ in float64; None where that is no finite number."""
    wide = reference.astype(np.float64)
    norm = float(np.linalg.norm(wide))
    difference = float(np.linalg.norm(output.astype(np.float64) - wide))
    return difference / norm if norm > 0 and np.isfinite(difference / norm) else None


def _one_line(error: BaseException) -> str:
    from .worker import describe

    return describe(error)
