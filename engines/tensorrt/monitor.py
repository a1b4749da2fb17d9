"""The progress of a build, from TensorRT's own phases (`IProgressMonitor`, from 10.0)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...progress import Progress

_SILENT_SECONDS = 30.0
_SECONDS_BETWEEN = 10.0  # lines are for logs: a build takes minutes


@dataclass
class _Phase:
    """A phase of a build: `steps` of it, `done` so far."""

    name: str
    parent: str | None
    steps: int
    started: float
    done: int = 0


class BuildPhases:
    """Phases as TensorRT reports them; says the outermost one's steps and the time left.

    Phases nest, and a step of the outer one ends when the inner ones do. Time left is that of the
    outermost phase by its finished steps: coarse, but it never counts work that is not known yet.
    """

    def __init__(self, progress: Progress, clock: Callable[[], float] = time.monotonic) -> None:
        self.progress = progress
        self.clock = clock
        self.phases: dict[str, _Phase] = {}
        self.cancelled = False
        self._said = -_SECONDS_BETWEEN

    def start(self, name: str, parent: str | None, steps: int) -> None:
        self.phases[name] = _Phase(name, parent, steps, self.clock())
        if parent is None:
            self.progress.say(f"TensorRT: {name}, {steps} steps")

    def step(self, name: str, step: int) -> bool:
        """Count a finished step; False asks TensorRT to stop."""
        phase = self.phases.get(name)
        if phase is not None:
            phase.done = step + 1
            if phase.parent is None:
                self._say(phase)
        return not self.cancelled

    def finish(self, name: str) -> None:
        self.phases.pop(name, None)

    def _say(self, phase: _Phase) -> None:
        now = self.clock()
        if now - self._said < _SECONDS_BETWEEN or phase.done >= phase.steps:
            return
        self._said = now
        left = (now - phase.started) / phase.done * (phase.steps - phase.done)
        self.progress.say(
            f"TensorRT: {phase.name} {phase.done}/{phase.steps}, about {left:.0f} s left"
        )


@contextmanager
def heartbeat(progress: Progress, name: str, seconds: float = _SILENT_SECONDS) -> Iterator[None]:
    """Say every so often that a build goes on, for versions that tell nothing of it themselves.

    TensorRT builds without Python's lock, so that a thread can speak.
    """
    started, finished = time.monotonic(), threading.Event()

    def speak() -> None:
        while not finished.wait(seconds):
            passed = time.monotonic() - started
            progress.say(f"TensorRT: still building {name}, {passed:.0f} s so far")

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def make_monitor(trt: Any, progress: Progress) -> Any:
    """A `tensorrt.IProgressMonitor` over `BuildPhases`; None where this version has none."""
    if not hasattr(trt, "IProgressMonitor"):
        return None
    phases = BuildPhases(progress)

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase or None, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                return phases.step(phase_name, step)
            except KeyboardInterrupt:  # raised through C++ it would end the process
                phases.cancelled = True
                return False

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return Monitor()
