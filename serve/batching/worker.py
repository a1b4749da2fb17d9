"""A thread that steps a mixer: bounded admission before it, recovery of the engine behind it."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Protocol

from ..errors import (
    ClientGoneError,
    EngineFailedError,
    QueueFullError,
    ServeError,
    UnavailableError,
)
from ..torch_threads import use_one_thread
from .jobs import Event, Failed, Finished, Job, Listener
from .mixer import Backlog, StepMixer, StepReport

log = logging.getLogger("qdit.serve")

_LONGEST_BACKOFF = 60.0


class State(Enum):
    """Of a worker. Requests are taken in READY and RECOVERING."""

    READY = "ready"
    RECOVERING = "recovering"  # a call failed; the engine is being tried
    FAILED = "failed"  # the engine does not come back; it is tried again and again
    STOPPED = "stopped"


class Recovery(Protocol):
    """Ways to get a failed engine back; both raise when it does not work."""

    def probe(self) -> None:
        """One small call whose result is checked."""

    def reopen(self) -> None:
        """Close the engine, open it again and probe it."""


class Observer(Protocol):
    """Who counts what happens; called in the worker's thread and in those of its callers."""

    def called(self, report: StepReport) -> None:
        """After every engine call."""

    def ended(self, job: Job, error: ServeError | None) -> None:
        """After a job's last event."""

    def waiting(self, images: int) -> None:
        """The images at hand, whenever their number changes."""


@dataclass(frozen=True)
class Bounds:
    """What a worker takes: images at hand at most, and the longest likely time to the end."""

    images: int
    seconds: float


class Worker:
    """Runs `mixer` in a thread of its own; `submit` and `cancel` may come from any thread.

    A submitted job gets exactly one last event: `Finished` with `is_last`, or `Failed`.
    """

    def __init__(
        self,
        mixer: StepMixer,
        recovery: Recovery,
        observer: Observer,
        bounds: Bounds,
        *,
        name: str = "batcher",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mixer = mixer
        self._recovery = recovery
        self._observer = observer
        self._bounds = bounds
        self._clock = clock
        self._changed = threading.Condition()
        self._inbox: deque[Job] = deque()
        self._open: dict[Job, _Account] = {}  # every job without its last event
        self._images = 0
        self._stopping = False
        self._state = State.READY
        self._backlog = Backlog()
        self._call_started: float | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def state(self) -> State:
        return self._state

    @property
    def images(self) -> int:
        """Images submitted and not finished, failed or cancelled."""
        return self._images

    @property
    def backlog(self) -> Backlog:
        """As it was after the last engine call."""
        return self._backlog

    @property
    def seconds_in_call(self) -> float:
        """How long the present engine call has been running; 0 between calls."""
        started = self._call_started
        return 0.0 if started is None else self._clock() - started

    def submit(self, job: Job) -> None:
        """Queue a job. Raises `QueueFullError` past the bounds, else `UnavailableError`."""
        with self._changed:
            if self._stopping or self._state in (State.FAILED, State.STOPPED):
                raise UnavailableError("the engine is not usable now; try again later", 10)
            self._check_bounds(job)
            self._open[job] = _Account(job.listener, job.image_count)
            self._images += job.image_count
            job.listener = partial(self._pass_on, job)
            self._inbox.append(job)
            self._changed.notify()
        self._observer.waiting(self._images)

    def cancel(self, job: Job) -> None:
        """Give up a job: nothing more is told of it, and its places are free at once.

        A call that is running ends first; the next one is without it. A job that has ended is left
        as it is.
        """
        with self._changed:
            account = self._open.pop(job, None)
            if account is None:
                return
            job.cancelled = True
            self._images -= account.images_left
            self._changed.notify()
        self._observer.waiting(self._images)
        self._observer.ended(job, ClientGoneError("the client went away"))

    def stop(self, timeout: float | None = None) -> bool:
        """End the thread after the call it is in; jobs at hand fail. False: it still runs."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _check_bounds(self, job: Job) -> None:
        if self._images + job.image_count > self._bounds.images:
            excess = self._images + job.image_count - self._bounds.images
            raise QueueFullError(
                f"the queue holds {self._images} images and may hold {self._bounds.images}",
                _retry_after(self._backlog.seconds_until_room(excess)),
            )
        before = sum(waiting.work_left for waiting in self._inbox)
        seconds = self._backlog.seconds_for(job.work_left, before)
        if seconds > self._bounds.seconds:
            raise QueueFullError(
                f"this request would take about {seconds:.0f} s with what is queued, "
                f"and may take {self._bounds.seconds:.0f} s",
                _retry_after(seconds - self._bounds.seconds),
            )

    def _pass_on(self, job: Job, event: Event) -> None:
        """Tell the caller, unless it cancelled; keep the accounts."""
        with self._changed:
            account = self._open.get(job)
            if account is None:
                return
            if isinstance(event, Finished):
                account.images_left -= 1
                self._images -= 1
            is_last = isinstance(event, Failed) or (isinstance(event, Finished) and event.is_last)
            if is_last:
                self._images -= account.images_left
                del self._open[job]
        if isinstance(event, Finished | Failed):
            self._observer.waiting(self._images)
        if is_last:
            self._observer.ended(job, event.error if isinstance(event, Failed) else None)
        try:
            account.listener(event)
        except Exception:  # its loop may be closed by now
            log.exception("nobody could be told of an event")

    def _run(self) -> None:
        use_one_thread()
        while self._take_in():
            self._step_safely()
        self._mixer.fail_all(UnavailableError("the server stopped"))
        with self._changed:
            self._state = State.STOPPED
            left = list(self._inbox)
        for job in left:
            job.listener(Failed(UnavailableError("the server stopped")))

    def _take_in(self) -> bool:
        """Wait for work and hand what was submitted to the mixer; False once it is to stop."""
        with self._changed:
            while not (self._inbox or len(self._mixer) or self._stopping):
                self._changed.wait()
            if self._stopping:
                return False
            arrivals = list(self._inbox)
            self._inbox.clear()
        for job in arrivals:
            self._mixer.submit(job)
        return True

    def _step_safely(self) -> None:
        try:
            self._step()
        except Exception:  # a fault of the batcher itself: no job may hang for it
            log.exception("the batcher failed")
            self._mixer.fail_all(EngineFailedError("the batcher failed; see the server's log"))

    def _step(self) -> None:
        self._call_started = self._clock()
        try:
            report = self._mixer.step()
        finally:
            self._call_started = None
        self._backlog = self._mixer.backlog()
        if report is None:
            return
        self._observer.called(report)
        if report.error is not None:
            log.error("an engine call of %d rows failed: %s", report.rows, report.error)
            self._recover()

    def _recover(self) -> None:
        """Try the engine, then open it again, for as long as it takes; between tries wait longer.

        Jobs at hand wait for the first try and fail when that does not help.
        """
        self._state = State.RECOVERING
        delay = 0.0
        works = self._try("passes its probe", self._recovery.probe)
        while not works and not self._stopped_within(delay):
            works = self._try("is open again", self._recovery.reopen)
            if not works:
                self._give_up()
                delay = min(max(1.0, 2 * delay), _LONGEST_BACKOFF)
        if works:
            self._state = State.READY

    def _try(self, success: str, action: Callable[[], None]) -> bool:
        try:
            action()
        except Exception as error:  # engines raise kinds of their own
            log.error("the engine failed again: %s", error)
            return False
        log.warning("the engine %s and serves on", success)
        return True

    def _give_up(self) -> None:
        with self._changed:
            self._state = State.FAILED
            arrivals = list(self._inbox)
            self._inbox.clear()
        failure = UnavailableError("the engine failed and cannot be opened again now", 10)
        self._mixer.fail_all(failure)
        for job in arrivals:
            job.listener(Failed(failure))

    def _stopped_within(self, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._stopping, timeout=seconds)


@dataclass
class _Account:
    listener: Listener
    images_left: int


def _retry_after(seconds: float) -> int:
    """Whole seconds for a Retry-After header, 1 … 600."""
    return int(min(max(math.ceil(seconds), 1), 600))
