"""A small sampled model, engines that are functions, and a clock that only tests move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from torch import Tensor

from qdit.calibrate.sampling import SampledModel, SamplingSettings, Trajectory
from qdit.calibrate.sources.schedulers import default_scheduler_config
from qdit.serve.batching.jobs import Event, Failed, Finished, Job
from qdit.serve.batching.mixer import StepMixer

SHAPE = (3, 4, 4)
MODEL = SampledModel(
    SHAPE, class_count=10, null_label=10, scheduler_config=default_scheduler_config()
)


def elementwise(x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
    """A denoiser whose rows cannot depend on each other, not even by rounding."""
    shift = (labels * 0.01 + timesteps * 1e-4)[:, None, None, None]
    return (x * 0.9 + shift).tanh()


@dataclass
class FakeClock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeEngine:
    """Takes `seconds(rows)` of the clock for a call, and notes what it saw."""

    clock: FakeClock
    seconds: Callable[[int], float] = lambda rows: 0.01 * rows
    calls: list[tuple[list[int], list[int]]] = field(default_factory=list)
    failures: list[int] = field(default_factory=list)  # numbers of the calls that fail, from 0

    def __call__(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        self.calls.append((timesteps.tolist(), labels.tolist()))
        self.clock.now += self.seconds(len(x))
        if len(self.calls) - 1 in self.failures:
            raise RuntimeError("out of memory")
        return elementwise(x, timesteps, labels)

    @property
    def rows(self) -> list[int]:
        return [len(timesteps) for timesteps, _ in self.calls]


class Listening(list[Event]):
    """A listener: what was told, in order."""

    __call__ = list.append  # type: ignore[assignment]

    @property
    def images(self) -> dict[int, Tensor]:
        return {event.image: event.sample for event in self if isinstance(event, Finished)}

    @property
    def error(self) -> Any:
        return next((event.error for event in self if isinstance(event, Failed)), None)

    @property
    def endings(self) -> int:
        """How often it was told the end: exactly once, for any job."""
        return sum(
            isinstance(event, Failed) or (isinstance(event, Finished) and event.is_last)
            for event in self
        )


def make_job(
    steps: int = 5,
    label: int = 0,
    *,
    images: int = 1,
    guidance: float = 1.0,
    seed: int = 0,
    scheduler: str | None = None,
    **options: Any,
) -> tuple[Job, Listening]:
    told = Listening()
    settings = SamplingSettings(steps, guidance, seed, scheduler)
    indices = [label + number * MODEL.class_count for number in range(images)]
    return Job([Trajectory(MODEL, settings, [i]) for i in indices], told, **options), told


def run_all(mixer: StepMixer, limit: int = 10_000) -> int:
    """Step until nothing is left; the number of engine calls."""
    for calls in range(limit):
        if mixer.step() is None:
            return calls
    raise AssertionError(f"not done after {limit} calls")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def engine(clock: FakeClock) -> FakeEngine:
    return FakeEngine(clock)


@pytest.fixture
def mixer(clock: FakeClock, engine: FakeEngine) -> StepMixer:
    return StepMixer(engine, max_rows=8, clock=clock)
