"""Events of a job, told in another thread, as its request gets them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from qdit.serve.backend import ImageUpdate, ProgressUpdate, Update
from qdit.serve.batching.jobs import Event, Failed, Finished, Preview, Progress
from qdit.serve.errors import EngineFailedError, RequestTimeoutError
from qdit.serve.updates import Updates

from .conftest import PATIENCE


def encode(sample: Tensor) -> bytes:
    return str(sample.item()).encode()


def finished(image: int, *, is_last: bool = False) -> Finished:
    return Finished(image, torch.tensor(float(image)), is_last)


def with_updates(
    test: Callable[[Updates], Awaitable[None]], encoder: Callable[[Tensor], bytes] = encode
) -> None:
    async def run() -> None:
        with ThreadPoolExecutor(4) as encoders:
            await asyncio.wait_for(test(Updates(encoder, encoders)), PATIENCE)

    asyncio.run(run())


def tell(updates: Updates, *events: Event) -> None:
    """As the batcher: in a thread that is not the event loop's."""
    thread = threading.Thread(target=lambda: [updates.tell(event) for event in events])
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def later() -> float:
    return time.monotonic() + PATIENCE


def test_in_the_order_of_the_events_however_long_one_is_encoded() -> None:
    events: list[Event] = [Progress(1, 8, None)]
    wanted: list[Update] = [ProgressUpdate(1, 8, None)]
    for number in range(20):
        sample = torch.tensor(float(number))
        events += [Preview(0, number, sample), Progress(number, 8, 0.5), finished(number)]
        data = encode(sample)
        wanted += [ImageUpdate(0, number, data), ProgressUpdate(number, 8, 0.5)]
        wanted += [ImageUpdate(number, None, data)]

    def slow(sample: Tensor) -> bytes:
        time.sleep(0.002 * (int(sample) % 3))
        return encode(sample)

    async def test(updates: Updates) -> None:
        await asyncio.to_thread(tell, updates, *events)
        assert [await updates.next(later()) for _ in wanted] == wanted

    with_updates(test, slow)


def test_neither_the_batcher_nor_the_event_loop_waits_for_the_encoder() -> None:
    gate = threading.Event()

    def stuck(sample: Tensor) -> bytes:
        assert gate.wait(PATIENCE)
        return encode(sample)

    async def test(updates: Updates) -> None:
        tell(updates, finished(0), finished(1, is_last=True))  # joins the thread that tells
        waiting = asyncio.ensure_future(updates.next(later()))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        gate.set()
        assert await waiting == ImageUpdate(0, None, b"0.0")
        assert await updates.next(later()) == ImageUpdate(1, None, b"1.0")

    with_updates(test, stuck)


def test_a_failure_is_raised_afresh_for_each_request() -> None:
    error = EngineFailedError("device lost")
    error.__cause__ = RuntimeError("of the driver")

    async def test(updates: Updates) -> None:
        tell(updates, Failed(error))
        with pytest.raises(EngineFailedError, match="device lost") as raised:
            await updates.next(later())
        assert raised.value is not error
        assert raised.value.__cause__ is error.__cause__

    with_updates(test)


def test_what_encoding_raises_reaches_the_request_and_stops_nothing() -> None:
    def broken(sample: Tensor) -> bytes:
        if sample == 0:
            raise ValueError("no such file format")
        return encode(sample)

    async def test(updates: Updates) -> None:
        tell(updates, finished(0), finished(1))
        with pytest.raises(ValueError, match="no such file format"):
            await updates.next(later())
        assert await updates.next(later()) == ImageUpdate(1, None, b"1.0")

    with_updates(test, broken)


def test_silence_past_the_deadline_is_a_timeout() -> None:
    async def test(updates: Updates) -> None:
        with pytest.raises(RequestTimeoutError, match="no sign of life"):
            await updates.next(time.monotonic() + 0.02)
        tell(updates, Progress(1, 2, None))
        assert await updates.next(later()) == ProgressUpdate(1, 2, None)

    with_updates(test)


def test_a_closed_loop_is_nobodys_fault() -> None:
    kept: list[Updates] = []

    async def test(updates: Updates) -> None:
        kept.append(updates)

    with_updates(test)
    kept[0].tell(Progress(1, 2, None))
