"""The worker's thread: bounds, cancelling, recovery, stopping; the engine is held by tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from torch import Tensor

from qdit.serve.batching.jobs import Finished, Job
from qdit.serve.batching.mixer import StepMixer, StepReport
from qdit.serve.batching.worker import Bounds, State, Worker
from qdit.serve.errors import (
    ClientGoneError,
    EngineFailedError,
    QueueFullError,
    ServeError,
    UnavailableError,
)

from .conftest import Listening, elementwise, make_job

PATIENCE = 10.0


def eventually(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


@dataclass
class GatedEngine:
    """Waits for `gate` in every call; raises while `broken`."""

    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)
    broken: bool = False
    calls: int = 0

    def __call__(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        self.entered.set()
        assert self.gate.wait(PATIENCE)
        if self.broken:
            raise RuntimeError("device lost")
        return elementwise(x, timesteps, labels)


@dataclass
class Recovering:
    """Notes what was tried; `probe` and `reopen` fail while their flag says so."""

    probe_fails: bool = False
    reopen_fails: int = 0  # so many times
    tried: list[str] = field(default_factory=list)

    def probe(self) -> None:
        self.tried.append("probe")
        if self.probe_fails:
            raise RuntimeError("still lost")

    def reopen(self) -> None:
        self.tried.append("reopen")
        if self.reopen_fails:
            self.reopen_fails -= 1
            raise RuntimeError("no device")


@dataclass
class Counting:
    reports: list[StepReport] = field(default_factory=list)
    endings: list[tuple[Job, ServeError | None]] = field(default_factory=list)
    images: list[int] = field(default_factory=list)

    def called(self, report: StepReport) -> None:
        self.reports.append(report)

    def ended(self, job: Job, error: ServeError | None) -> None:
        self.endings.append((job, error))

    def waiting(self, images: int) -> None:
        self.images.append(images)


@dataclass
class Set:
    worker: Worker
    engine: GatedEngine
    recovery: Recovering
    counts: Counting

    def submit(self, steps: int = 2, **options: object) -> tuple[Job, Listening]:
        job, told = make_job(steps, **options)
        self.worker.submit(job)
        return job, told


@pytest.fixture
def made() -> Iterator[Set]:
    engine, recovery, counts = GatedEngine(), Recovering(), Counting()
    mixer = StepMixer(engine, max_rows=4, clock=time.monotonic)
    worker = Worker(mixer, recovery, counts, Bounds(images=6, seconds=60))
    worker.start()
    yield Set(worker, engine, recovery, counts)
    engine.gate.set()
    assert worker.stop(PATIENCE)


def test_jobs_run_to_their_end(made: Set) -> None:
    made.engine.gate.set()
    jobs = [made.submit(3, label=label) for label in range(5)]
    eventually(lambda: all(told.endings for _, told in jobs))
    assert all(told.endings == 1 and told.error is None for _, told in jobs)
    eventually(lambda: len(made.counts.endings) == 5)
    assert made.worker.images == 0
    assert made.counts.images[-1] == 0
    assert sum(report.rows for report in made.counts.reports) == 15


class TestBounds:
    def test_a_full_queue_says_when_to_come_again(self, made: Set) -> None:
        made.submit(2, images=4)
        made.submit(2, images=2)
        with pytest.raises(QueueFullError, match="holds 6 images and may hold 6") as refused:
            made.submit(2)
        assert refused.value.retry_after == 1
        assert made.worker.images == 6

    def test_what_would_take_too_long_is_refused_at_once(self) -> None:
        def slow(x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
            time.sleep(0.05)
            return elementwise(x, timesteps, labels)

        mixer = StepMixer(slow, max_rows=4, clock=time.monotonic)
        worker = Worker(mixer, Recovering(), Counting(), Bounds(images=100, seconds=5.0))
        worker.start()
        first, told = make_job(2)
        worker.submit(first)  # its speed is not known yet
        eventually(lambda: told.endings)
        with pytest.raises(QueueFullError, match=r"take about 5\d s .* may take 5 s") as refused:
            worker.submit(make_job(1000)[0])
        assert 40 <= refused.value.retry_after <= 60
        assert worker.stop(PATIENCE)

    def test_places_are_free_again_image_by_image(self, made: Set) -> None:
        job, told = made.submit(1, images=6)
        made.engine.gate.set()
        eventually(lambda: told.endings)
        assert made.worker.images == 0
        made.submit(1, images=6)
        assert job.image_count == 6


class TestCancelling:
    def test_frees_the_queue_at_once_and_the_engine_at_the_next_call(self, made: Set) -> None:
        first, told = made.submit(50, images=4)
        assert made.engine.entered.wait(PATIENCE)  # the call with its four rows is running
        made.submit(2, images=2)
        made.worker.cancel(first)
        assert made.worker.images == 2
        late = made.submit(2, images=4)[1]
        made.engine.gate.set()
        eventually(lambda: late.endings)
        assert made.counts.reports[0].rows == 4
        assert all(report.rows <= 4 for report in made.counts.reports)
        assert sum(report.rows for report in made.counts.reports) == 4 + 2 * 2 + 4 * 2
        assert not told.endings  # who left is told nothing
        assert [type(error) for job, error in made.counts.endings if job is first] == [
            ClientGoneError
        ]

    def test_after_the_end_changes_nothing(self, made: Set) -> None:
        made.engine.gate.set()
        job, told = made.submit(1)
        eventually(lambda: told.endings)
        made.worker.cancel(job)
        made.worker.cancel(job)
        assert [error for one, error in made.counts.endings if one is job] == [None]
        assert made.worker.images == 0

    def test_before_the_first_call(self, made: Set) -> None:
        made.submit(2)
        assert made.engine.entered.wait(PATIENCE)
        job, told = made.submit(5, images=3)
        made.worker.cancel(job)
        made.engine.gate.set()
        eventually(lambda: len(made.counts.endings) == 2)
        assert not told.endings
        assert sum(report.rows for report in made.counts.reports) == 2


class TestRecovery:
    def test_a_single_failure_fails_its_batch_and_the_rest_goes_on(self, made: Set) -> None:
        made.engine.broken = True
        _, unlucky = made.submit(3, images=4)
        assert made.engine.entered.wait(PATIENCE)
        _, waiting = made.submit(3)
        made.engine.gate.set()
        eventually(lambda: unlucky.endings)
        made.engine.broken = False
        eventually(lambda: waiting.endings)
        assert isinstance(unlucky.error, EngineFailedError)
        assert "device lost" in str(unlucky.error)
        assert made.worker.state is State.READY
        assert set(made.recovery.tried) == {"probe"}

    def test_an_engine_that_fails_its_probe_is_opened_again(self, made: Set) -> None:
        made.recovery.probe_fails = True
        made.engine.broken = True
        _, told = made.submit(3)
        assert made.engine.entered.wait(PATIENCE)
        made.engine.gate.set()
        eventually(lambda: told.endings)
        made.engine.broken = False
        eventually(lambda: made.worker.state is State.READY)
        assert made.recovery.tried == ["probe", "reopen"]
        eventually(lambda: made.submit(1)[1].endings or True)

    def test_without_an_engine_requests_are_refused_until_it_is_back(self, made: Set) -> None:
        made.recovery.probe_fails = True
        made.recovery.reopen_fails = 2
        made.engine.broken = True
        _, unlucky = made.submit(3, images=4)
        assert made.engine.entered.wait(PATIENCE)
        _, waiting = made.submit(3)
        made.engine.gate.set()
        eventually(lambda: made.worker.state is State.FAILED)
        with pytest.raises(UnavailableError, match="not usable now") as refused:
            made.submit(1)
        assert refused.value.retry_after == 10
        eventually(lambda: waiting.endings)
        assert isinstance(unlucky.error, EngineFailedError)
        assert isinstance(waiting.error, UnavailableError)
        assert made.worker.images == 0
        made.engine.broken = False
        eventually(lambda: made.worker.state is State.READY)  # after 0, 1 and 2 s
        assert made.recovery.tried == ["probe", "reopen", "reopen", "reopen"]
        _, told = made.submit(1)
        eventually(lambda: told.endings)
        assert told.error is None

    def test_a_fault_of_the_batcher_hangs_nobody(
        self, made: Set, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fault(_jobs: object, _room: int) -> list[object]:
            raise KeyError("a bug")

        monkeypatch.setattr(made.worker._mixer, "_policy", fault)
        _, told = made.submit(2)
        eventually(lambda: told.endings)
        assert "the batcher failed" in str(told.error)
        monkeypatch.undo()
        made.engine.gate.set()
        _, again = made.submit(2)
        eventually(lambda: again.endings)
        assert again.error is None


class TestStopping:
    def test_fails_what_is_left_and_takes_no_more(self, made: Set) -> None:
        _, running = made.submit(50)
        assert made.engine.entered.wait(PATIENCE)
        _, queued = made.submit(5)
        assert not made.worker.stop(0.05)  # the call has not returned
        with pytest.raises(UnavailableError):
            made.submit(1)
        made.engine.gate.set()
        assert made.worker.stop(PATIENCE)
        for told in (running, queued):
            assert told.endings == 1
            assert isinstance(told.error, UnavailableError)
        assert made.worker.state is State.STOPPED
        assert made.worker.images == 0

    def test_a_call_that_hangs_shows(self, made: Set) -> None:
        made.submit(2)
        assert made.engine.entered.wait(PATIENCE)
        eventually(lambda: made.worker.seconds_in_call > 0.02)
        made.engine.gate.set()
        eventually(lambda: made.worker.seconds_in_call == 0)


def test_a_listener_that_raises_harms_nobody(made: Set) -> None:
    made.engine.gate.set()
    job, _ = make_job(2)

    def raises(_event: object) -> None:
        raise RuntimeError("the loop is closed")

    job.listener = raises
    made.worker.submit(job)
    _, told = made.submit(3)
    eventually(lambda: told.endings)
    assert isinstance(told[-1], Finished)
    eventually(lambda: len(made.counts.endings) == 2)
