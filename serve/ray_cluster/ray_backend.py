"""Images made by replicas on a cluster: a request whose replica dies goes to another one."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..backend import Generation, Health, ProgressUpdate, Update
from ..cards import ModelCard
from ..errors import EngineFailedError, RequestTimeoutError, ServeError, UnavailableError

log = logging.getLogger("qdit.serve")

_MOST_TRIES = 4
_SECONDS_PAST_THE_DEADLINE = 5.0  # the replica tells of it itself
_SECONDS_OF_HEALTH = 1.0  # asking the controller takes its time, so an answer is kept for a while


class RayBackend:
    """`Backend` over a deployment of `Replica`.

    * `application`: its name in Ray Serve; `handle`: the deployment's;
    * `replicas_running`: asks the controller, blocking;
    * `shut_down`: ends the deployment, blocking.

    Equal generations give equal images (`Generation`), so a request can begin anew elsewhere; what
    was sent before its replica died is not sent again.
    """

    def __init__(
        self,
        application: str,
        handle: Any,
        cards: Mapping[str, ModelCard],
        replicas_running: Callable[[], int],
        shut_down: Callable[[], None],
    ) -> None:
        from ray import exceptions
        from ray.serve import exceptions as serve_exceptions

        self.application = application
        self._stream = handle.options(stream=True).generate
        self._cards = cards
        self._replicas_running = replicas_running
        self._shut_down = shut_down
        self._task_error = exceptions.RayTaskError
        self._ray_error = exceptions.RayError
        self._serve_error = serve_exceptions.RayServeException
        self._health: tuple[float, Health] | None = None
        self._closed = False

    @property
    def cards(self) -> Mapping[str, ModelCard]:
        return self._cards

    async def generate(self, generation: Generation) -> AsyncIterator[Update]:
        deadline = time.monotonic() + generation.seconds
        sent = _Sent(generation.images)
        for tries in range(1, _MOST_TRIES + 1):
            stream = self._stream.remote(
                replace(generation, seconds=max(deadline - time.monotonic(), 0.001))
            )
            try:
                while (update := await self._next(stream, deadline)) is not None:
                    if sent.is_new(update):
                        yield update
                if sent.is_complete:
                    return
                error: Exception = RuntimeError("its stream ended early")
            except self._task_error as failure:  # a fault of ours in there: no other replica helps
                raise EngineFailedError(f"the replica failed: {failure.cause}") from failure
            except self._ray_error as failure:
                error = failure
            finally:
                stream.cancel()
            log.warning(
                "request %s: its replica is lost (%s), try %d of %d",
                generation.request_id, type(error).__name__, tries, _MOST_TRIES,
            )  # fmt: skip
        raise EngineFailedError(f"{_MOST_TRIES} replicas died while they made this image")

    async def _next(self, stream: Any, deadline: float) -> Update | None:
        patience = deadline + _SECONDS_PAST_THE_DEADLINE - time.monotonic()
        try:
            update = await asyncio.wait_for(_after(stream), max(patience, 0))
        except asyncio.TimeoutError as error:
            raise RequestTimeoutError("no replica answered in this request's time") from error
        except self._serve_error as error:
            raise UnavailableError("the replicas are not to be reached; try again later") from error
        if isinstance(update, ServeError):
            raise update
        return update

    async def health(self) -> Health:
        now = time.monotonic()
        if self._health is None or now - self._health[0] > _SECONDS_OF_HEALTH:
            self._health = (now, await asyncio.to_thread(self._ask))
        return self._health[1]

    def _ask(self) -> Health:
        try:
            running = 0 if self._closed else self._replicas_running()
        except Exception as error:  # the cluster is gone: Ray raises kinds of its own
            log.error("the cluster does not answer: %s", error)
            return Health(live=False, ready=False, states=dict.fromkeys(self._cards, "lost"))
        state = "ready" if running else "no replica is running"
        return Health(live=True, ready=running > 0, states=dict.fromkeys(self._cards, state))

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            await asyncio.to_thread(self._shut_down)


async def _after(stream: Any) -> Any:
    return await anext(stream, None)


@dataclass
class _Sent:
    """What the client has. A second replica makes the same again from the start."""

    images: int
    step: int = -1
    pictures: set[tuple[int, int | None]] = field(default_factory=set)

    def is_new(self, update: Update) -> bool:
        """Whether the client lacks it; it has it from now on."""
        if isinstance(update, ProgressUpdate):
            ahead = update.step > self.step
            self.step = max(self.step, update.step)
            return ahead
        name = (update.image, update.preview)
        known = name in self.pictures or (update.image, None) in self.pictures
        self.pictures.add(name)
        return not known

    @property
    def is_complete(self) -> bool:
        return sum(preview is None for _, preview in self.pictures) == self.images
