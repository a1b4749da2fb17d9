"""From a job's events, told in the batcher's thread, to the updates that its request waits for."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress

from torch import Tensor

from .backend import ImageUpdate, ProgressUpdate, Update
from .batching.jobs import Event, Failed, Finished, Preview, Progress
from .errors import RequestTimeoutError, ServeError


class Updates:
    """One request's updates, in the order of the events.

    `tell` is the job's listener; `encode` makes an image file of a sample, in a thread of
    `encoders` and one after the other, so that neither the batcher nor the event loop waits for it.
    The event loop that made this object awaits `next`.
    """

    def __init__(self, encode: Callable[[Tensor], bytes], encoders: Executor) -> None:
        self._encode = encode
        self._encoders = encoders
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._events: deque[Event] = deque()  # that wait for the encoder
        self._is_encoding = False
        self._ready: deque[Update | Exception] = deque()  # the event loop's
        self._waiter: asyncio.Future[None] | None = None

    def tell(self, event: Event) -> None:
        """From one thread at a time. Does not block."""
        with self._lock:
            if not self._is_encoding and not isinstance(event, Preview | Finished):
                self._deliver(event)
                return
            self._events.append(event)
            if self._is_encoding:
                return
            self._is_encoding = True
        self._encoders.submit(self._encode_all)

    async def next(self, deadline: float) -> Update:
        """Raises the job's `ServeError`, what encoding raised, and `RequestTimeoutError` once
        `time.monotonic()` has passed `deadline`."""
        if not self._ready:
            self._waiter = waiter = self._loop.create_future()
            seconds = max(deadline - time.monotonic(), 0)
            timer = self._loop.call_later(seconds, _wake, waiter)
            try:
                await waiter
            finally:
                timer.cancel()
                self._waiter = None
        if not self._ready:
            raise RequestTimeoutError("the engine gave no sign of life in this request's time")
        update = self._ready.popleft()
        if isinstance(update, Exception):
            raise update
        return update

    def _encode_all(self) -> None:
        while True:
            with self._lock:
                if not self._events:
                    self._is_encoding = False
                    return
                event = self._events.popleft()
            self._deliver(event)

    def _deliver(self, event: Event) -> None:
        try:
            update: Update | Exception = self._update_of(event)
        except Exception as error:  # of the VAE: the request's to tell
            update = error
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._put, update)

    def _update_of(self, event: Event) -> Update | Exception:
        if isinstance(event, Failed):
            return _fresh(event.error)
        if isinstance(event, Progress):
            return ProgressUpdate(event.step, event.steps, event.eta)
        preview = event.ordinal if isinstance(event, Preview) else None
        return ImageUpdate(event.image, preview, self._encode(event.sample))

    def _put(self, update: Update | Exception) -> None:
        self._ready.append(update)
        if self._waiter is not None:
            _wake(self._waiter)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _fresh(error: ServeError) -> ServeError:
    """The error for this request alone: raising adds to an exception, and a batch shares one."""
    made = type(error)(*error.args)
    made.__cause__ = error.__cause__
    return made
