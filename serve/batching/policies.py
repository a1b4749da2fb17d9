"""Which samples the next engine call serves. The first is the server's; the others are what it is
measured against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...errors import InputError
from .jobs import Job, Sample

# From the jobs at hand in order of admission and the rows of one call: the samples it serves.
Policy = Callable[[Sequence[Job], int], list[Sample]]


def _fill(samples: Sequence[Sample], room: int) -> list[Sample]:
    """The first samples that fit into `room` rows; a smaller later one fills what is left."""
    chosen = []
    for sample in samples:
        if sample.rows <= room:
            chosen.append(sample)
            room -= sample.rows
        if room == 0:
            break
    return chosen


def step_mixed(jobs: Sequence[Job], room: int) -> list[Sample]:
    """At every step anew: the samples of the jobs that are due first."""
    ordered = sorted(jobs, key=lambda job: job.turn)
    return _fill([sample for job in ordered for sample in job.samples], room)


class WholeTrajectories:
    """Batches that run to their end: what waits joins when all of a batch is finished.

    More generous than servers that batch whole calls can be: samples of any step counts and
    guidance share a batch, and each is answered as soon as it is done itself.
    """

    def __init__(self) -> None:
        self._batch: set[Sample] = set()

    def __call__(self, jobs: Sequence[Job], room: int) -> list[Sample]:
        at_hand = [sample for job in jobs for sample in job.samples]
        running = [sample for sample in at_hand if sample in self._batch]
        if not running:
            running = _fill(at_hand, room)
            self._batch = set(running)
        return running


def one_at_a_time(jobs: Sequence[Job], room: int) -> list[Sample]:
    """The images of the oldest request alone, as a server without batching would."""
    return _fill(jobs[0].samples, room) if jobs else []


_POLICIES: dict[str, Callable[[], Policy]] = {
    "step-mixed": lambda: step_mixed,
    "whole-trajectory": WholeTrajectories,
    "single": lambda: one_at_a_time,
}
POLICY_NAMES = tuple(_POLICIES)


def make_policy(name: str) -> Policy:
    """A fresh policy by name; raises `InputError` for another name."""
    if name not in _POLICIES:
        raise InputError(f"batching must be one of {', '.join(POLICY_NAMES)}, got {name!r}")
    return _POLICIES[name]()
