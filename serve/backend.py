"""What the HTTP layer asks of whatever makes the images: this process, or replicas of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from .cards import ModelCard
from .images import ImageFormat


@dataclass(frozen=True)
class Generation:
    """One request, checked and complete: equal generations give equal images, within the
    tolerance that docs/serve.md has for each engine.

    Image j is the sampler's sample `label + j · class_count` of `seed` (calibrate/sampling.py).
    `previews`: of each image, before it is finished; `tells_progress`: after each engine call;
    `seconds`: until it is given up.
    """

    request_id: str
    model: str
    label: int
    images: int
    steps: int
    guidance: float
    seed: int
    scheduler: str | None
    image_format: ImageFormat
    quality: int | None
    previews: int
    tells_progress: bool
    seconds: float


@dataclass(frozen=True)
class ProgressUpdate:
    """`step` of `steps` are done, of all images together; `eta` in seconds, None: not known."""

    step: int
    steps: int
    eta: float | None


@dataclass(frozen=True)
class ImageUpdate:
    """An image file: finished where `preview` is None, else its preview of that number."""

    image: int
    preview: int | None
    data: bytes


Update = ProgressUpdate | ImageUpdate


@dataclass(frozen=True)
class Health:
    """`ready`: takes requests; `live`: worth keeping; `states`: of each model's engine."""

    live: bool
    ready: bool
    states: Mapping[str, str]


class Backend(Protocol):
    """Makes images. Nothing here blocks the event loop."""

    @property
    def cards(self) -> Mapping[str, ModelCard]:
        """The models by id; the first is the default."""

    def generate(self, generation: Generation) -> AsyncIterator[Update]:
        """Updates until every image was sent finished. Closing the iterator cancels the rest.

        Raises a `ServeError`, at the first step or later.
        """

    async def health(self) -> Health:
        """Now."""

    async def close(self) -> None:
        """End what is running and free the engines."""
