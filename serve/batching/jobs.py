"""A job: the images of one request on their way, and what is told about it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from ...calibrate.sampling import Trajectory
from ..errors import ServeError


@dataclass(frozen=True)
class Progress:
    """`step` of `steps` engine calls are done, of all images together; `eta` in seconds."""

    step: int
    steps: int
    eta: float | None


@dataclass(frozen=True)
class Preview:
    """Image `image` as its last step foresaw it, [C, H, W]: the `ordinal`-th preview, from 0."""

    image: int
    ordinal: int
    sample: Tensor


@dataclass(frozen=True)
class Finished:
    """Image `image` is done: latents or pixels [C, H, W]. The last one ends the job."""

    image: int
    sample: Tensor
    is_last: bool


@dataclass(frozen=True)
class Failed:
    """The job ends without its remaining images."""

    error: ServeError


Event = Progress | Preview | Finished | Failed
# Called in the batcher's thread: it must not block and must not raise.
Listener = Callable[[Event], None]


@dataclass(eq=False)
class Sample:
    """One image of a job: a trajectory of a single sample."""

    job: Job
    image: int
    trajectory: Trajectory
    previews: int = 0

    @property
    def rows(self) -> int:
        return self.trajectory.row_count


@dataclass(eq=False)
class Job:
    """One request's images. `deadline` is a time of the batcher's clock.

    `previews` is how many previews of each image are wanted, spread evenly over its steps;
    `tells_progress` asks for a `Progress` after each engine call that served the job.
    """

    trajectories: list[Trajectory]
    listener: Listener
    deadline: float = math.inf
    previews: int = 0
    tells_progress: bool = False
    # the batcher's own notes
    due: float = field(default=0.0, init=False)  # virtual time: FairClock
    order: int = field(default=0, init=False)
    samples: list[Sample] = field(init=False)
    told: float = field(default=-math.inf, init=False)  # when progress was last told
    steps: int = field(init=False)
    steps_done: int = field(default=0, init=False)
    work_left: int = field(init=False)  # rows of engine work
    cancelled: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.samples = [Sample(self, i, t) for i, t in enumerate(self.trajectories)]
        self.steps = sum(t.steps_left for t in self.trajectories)
        self.work_left = sum(t.steps_left * t.row_count for t in self.trajectories)

    @property
    def image_count(self) -> int:
        return len(self.trajectories)

    @property
    def turn(self) -> tuple[float, int]:
        """Jobs are served in this order."""
        return self.due, self.order

    @property
    def calls_left(self) -> int:
        """Engine calls that it still needs if every one of them has room for all its images."""
        return max((sample.trajectory.steps_left for sample in self.samples), default=0)


def preview_due(sample: Sample) -> bool:
    """Whether the step just taken is one that the job wants to see.

    k previews of n steps come after steps n/(k+1), 2n/(k+1), …: never after the last one.
    """
    wanted, trajectory = sample.job.previews, sample.trajectory
    if sample.previews >= wanted or trajectory.steps_left == 0:
        return False
    steps = len(trajectory.timesteps)
    return trajectory.position * (wanted + 1) >= steps * (sample.previews + 1)
