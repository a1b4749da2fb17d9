"""The step-mixed batcher: one engine call after another, each for whatever samples are due.

Single-threaded and deterministic: clock, engine and listeners come from outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...calibrate.families.base import Denoiser
from ...calibrate.joint_steps import JointStep
from ...calibrate.sampling import Trajectory
from ...errors import InputError
from ..errors import ClientGoneError, EngineFailedError, RequestTimeoutError, ServeError
from .fairness import STRETCH, FairClock
from .jobs import Failed, Finished, Job, Preview, Progress, Sample, preview_due
from .policies import Policy, step_mixed

_SECONDS_BETWEEN_TELLING = 1.0
_MEMORY = 0.8  # weight of the past in the running averages of speed


@dataclass(frozen=True)
class StepReport:
    """One engine call: the samples and rows it served (`padded_rows` with padding) and its time.

    `error` is what the engine raised; all jobs of the call have failed then.
    """

    samples: int
    rows: int
    padded_rows: int
    seconds: float
    error: Exception | None = None


@dataclass(frozen=True)
class Backlog:
    """What is left to do. `jobs`: (virtual time due, rows, images) of each, in turn."""

    jobs: tuple[tuple[float, int, int], ...] = ()
    virtual_time: float = 0.0
    rows_per_second: float | None = None

    @property
    def rows(self) -> int:
        return sum(rows for _, rows, _ in self.jobs)

    def seconds_for(self, work: int, before: int = 0) -> float:
        """When a job of `work` rows that comes now, after `before` more rows, is likely done.

        0 where no call was timed yet.
        """
        if self.rows_per_second is None:
            return 0.0
        due = self.virtual_time + STRETCH * work
        ahead = sum(rows for other, rows, _ in self.jobs if other <= due)
        return (ahead + before + work) / self.rows_per_second

    def seconds_until_room(self, images: int) -> float:
        """When so many images of those at hand are likely done; 1 where no call was timed yet."""
        if self.rows_per_second is None:
            return 1.0
        rows, freed = 0, 0
        for _, left, count in self.jobs:
            if freed >= images:
                break
            rows, freed = rows + left, freed + count
        return rows / self.rows_per_second


class StepMixer:
    """Jobs in, one engine call a `step`, events out.

    * `denoise`: the engine as the sampling loop calls it;
    * `max_rows`: rows of one call; a guided sample takes two;
    * `batch_sizes`: ascending sizes that a call is padded up to, for engines that prepare one
      program a size; empty for engines that take any;
    * `clock`: seconds, monotonic.
    """

    def __init__(
        self,
        denoise: Denoiser,
        *,
        max_rows: int,
        clock: Callable[[], float],
        batch_sizes: Sequence[int] = (),
        policy: Policy = step_mixed,
    ) -> None:
        if max_rows < 2:
            raise InputError(f"a call needs room for 2 rows (guidance), got {max_rows}")
        self.denoise = denoise
        self.max_rows = max_rows
        self._batch_sizes = tuple(sorted(batch_sizes))
        self._clock = clock
        self._policy = policy
        self._fair = FairClock()
        self._jobs: dict[int, Job] = {}  # by order of admission
        self._admitted = 0
        self.rows_per_second: float | None = None
        self.seconds_per_call: float | None = None

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def image_count(self) -> int:
        """Images that are not finished."""
        return sum(len(job.samples) for job in self._jobs.values())

    def submit(self, job: Job) -> None:
        """Take a job: it may be served from the next step on."""
        self._admitted += 1
        job.order = self._admitted
        job.due = self._fair.due(job.work_left)
        self._jobs[job.order] = job
        self._tell_progress(served=())

    def fail_all(self, error: ServeError) -> None:
        """End every job with `error`."""
        for job in list(self._jobs.values()):
            self._end(job, error)

    def step(self) -> StepReport | None:
        """One engine call for the samples that are due; None where nothing is left to do.

        Cancelled and expired jobs leave first, so that their places go to others in this call.
        """
        self._drop_cancelled_and_late()
        chosen = self._policy(list(self._jobs.values()), self.max_rows)
        if not chosen:
            return None
        joint = JointStep([sample.trajectory for sample in chosen])
        count = sum(sample.rows for sample in chosen)
        padded = self._padded(count)
        rows = joint.rows(padded)
        started = self._clock()
        try:
            predicted = self._call(*rows)
        except Exception as error:  # engines raise kinds of their own
            self._fail(chosen, error)
            return StepReport(len(chosen), count, padded, self._clock() - started, error)
        seconds = self._clock() - started
        self._note_speed(count, seconds)
        self._fair.serve(count, len(self._jobs))
        self._advance(chosen, joint.advance(predicted))
        return StepReport(len(chosen), count, padded, seconds)

    def backlog(self) -> Backlog:
        """What is left to do, as a value that other threads may keep and ask."""
        in_turn = sorted(self._jobs.values(), key=lambda job: job.turn)
        return Backlog(
            tuple((job.due, job.work_left, len(job.samples)) for job in in_turn),
            self._fair.now,
            self.rows_per_second,
        )

    def _padded(self, count: int) -> int:
        return next((size for size in self._batch_sizes if size >= count), count)

    def _call(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        predicted = self.denoise(x, timesteps, labels)
        if predicted.shape != x.shape:
            raise RuntimeError(
                f"the engine must predict {list(x.shape)}, it gave {list(predicted.shape)}"
            )
        return predicted

    def _note_speed(self, rows: int, seconds: float) -> None:
        speed = rows / max(seconds, 1e-9)
        if self.rows_per_second is None or self.seconds_per_call is None:
            self.rows_per_second, self.seconds_per_call = speed, seconds
            return
        fresh = 1 - _MEMORY
        self.rows_per_second = _MEMORY * self.rows_per_second + fresh * speed
        self.seconds_per_call = _MEMORY * self.seconds_per_call + fresh * seconds

    def _advance(self, chosen: Sequence[Sample], failures: Mapping[Trajectory, Exception]) -> None:
        served: set[int] = set()
        for sample in chosen:
            job, failure = sample.job, failures.get(sample.trajectory)
            if job.order not in self._jobs:
                continue  # it failed by another of its images
            if failure is not None:
                error = EngineFailedError(f"the scheduler failed: {failure}")
                error.__cause__ = failure
                self._end(job, error)
                continue
            job.steps_done += 1
            job.work_left -= sample.rows
            served.add(job.order)
            self._tell_image(sample)
        self._tell_progress(served)

    def _tell_progress(self, served: Container[int]) -> None:
        """To the jobs that were served, and once in a while to those that wait.

        A job is done when what comes before it in turn and itself are, and not before it had a
        call for each of its steps.
        """
        if not any(job.tells_progress for job in self._jobs.values()):
            return
        now, ahead = self._clock(), 0
        for job in sorted(self._jobs.values(), key=lambda job: job.turn):
            ahead += job.work_left
            due = job.order in served or now - job.told >= _SECONDS_BETWEEN_TELLING
            if job.tells_progress and due:
                job.told = now
                job.listener(Progress(job.steps_done, job.steps, self._eta(job, ahead)))

    def _eta(self, job: Job, rows: int) -> float | None:
        if self.rows_per_second is None or self.seconds_per_call is None:
            return None
        return max(rows / self.rows_per_second, job.calls_left * self.seconds_per_call)

    def _tell_image(self, sample: Sample) -> None:
        job, trajectory = sample.job, sample.trajectory
        if preview_due(sample):
            job.listener(Preview(sample.image, sample.previews, trajectory.foreseen()[0]))
            sample.previews += 1
        if trajectory.steps_left:
            return
        if not _is_finite(trajectory.x):
            self._end(job, EngineFailedError("the engine gave values that are not finite"))
            return
        job.samples.remove(sample)
        is_last = not job.samples
        if is_last:
            del self._jobs[job.order]
        job.listener(Finished(sample.image, trajectory.x[0], is_last))

    def _fail(self, chosen: Sequence[Sample], error: Exception) -> None:
        failure = EngineFailedError(f"the engine failed while it made this image: {error}")
        failure.__cause__ = error
        for job in {sample.job.order: sample.job for sample in chosen}.values():
            self._end(job, failure)

    def _drop_cancelled_and_late(self) -> None:
        now = self._clock()
        for job in list(self._jobs.values()):
            if job.cancelled:
                self._end(job, ClientGoneError("the client went away"))
            elif now >= job.deadline:
                done = job.steps_done / job.steps
                self._end(
                    job,
                    RequestTimeoutError(f"the time for this request is over, {done:.0%} was done"),
                )

    def _end(self, job: Job, error: ServeError) -> None:
        del self._jobs[job.order]
        job.listener(Failed(error))


def _is_finite(x: Tensor) -> bool:
    """One sum tells it, unless finite values overflow it: one operation in place of six."""
    return math.isfinite(x.sum()) or bool(torch.isfinite(x).all())
