"""Server-sent events, read by the rules of the WHATWG, and what they tell."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from qdit.serve.web import sse

from ..conftest import Running, Switches, eventually

URL = "/v1/images/generations"


def events_of(lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """(type, data) of each event: fields until an empty line; comments start with a colon."""
    kind, data = "", []
    for line in lines:
        if not line:
            if data:
                yield kind, json.loads("\n".join(data))
            kind, data = "", []
        elif not line.startswith(":"):
            field, _, value = line.partition(":")
            if field == "event":
                kind = value.removeprefix(" ")
            elif field == "data":
                data.append(value.removeprefix(" "))


@pytest.fixture
def client(server: Running) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=20)


def stream_of(client: httpx.Client, **body: Any) -> Any:
    return client.stream("POST", URL, json={"prompt": "cat", "stream": True} | body)


def test_progress_previews_and_images(client: httpx.Client) -> None:
    with stream_of(client, n=2, num_inference_steps=8, partial_images=1, seed=3) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        events = list(events_of(response.iter_lines()))
    assert all(kind == data["type"] for kind, data in events)
    progress = [data for kind, data in events if kind == "image_generation.progress"]
    steps = [data["step"] for data in progress]
    assert steps == sorted(steps)
    assert (steps[0], progress[-1]["steps"]) == (0, 16)
    assert progress[-1]["eta_seconds"] >= 0
    previews = [data for kind, data in events if kind.endswith("partial_image")]
    assert sorted(data["index"] for data in previews) == [0, 1]
    images = [data for kind, data in events if kind.endswith("completed")]
    assert [data["index"] for data in images] == [0, 1]
    alone = client.post(
        URL, json={"prompt": "cat", "n": 2, "num_inference_steps": 8, "seed": 3}
    ).json()
    assert [d["b64_json"] for d in images] == [d["b64_json"] for d in alone["data"]]


def test_refusals_come_as_a_status_and_not_as_a_stream(client: httpx.Client) -> None:
    with stream_of(client, num_inference_steps=0) as response:
        assert response.status_code == 400
        assert response.read().startswith(b'{"error"')


def test_a_failure_ends_the_stream_with_its_error(client: httpx.Client, switches: Switches) -> None:
    switches.gate.clear()
    with stream_of(client) as response:
        events = events_of(response.iter_lines())
        assert next(events)[0] == "image_generation.progress"
        switches.broken = True
        switches.gate.set()
        kind, data = list(events)[-1]
    assert kind == "error"
    assert data["error"]["code"] == "engine_failed"


def test_a_client_that_leaves_frees_its_places(
    server: Running, client: httpx.Client, switches: Switches
) -> None:
    switches.seconds = 0.02
    with stream_of(client, n=4, num_inference_steps=200) as response:
        events = events_of(response.iter_lines())
        assert next(events)
        assert server.images() == 4
    eventually(lambda: server.images() == 0, patience=2)
    calls = len(switches.rows)
    assert client.post(URL, json={"prompt": "1", "num_inference_steps": 2}).status_code == 200
    assert len(switches.rows) - calls <= 2 + 2  # nobody is served who is not there
    text = client.get("/metrics").text
    assert 'outcome="client_closed_request"} 1.0' in text


def test_a_silent_stream_is_kept_alive() -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield b"one"
        await asyncio.sleep(0.07)
        yield b"two"

    async def read() -> list[bytes]:
        return [part async for part in sse.with_keep_alive(slow(), 0.02)]

    parts = asyncio.run(read())
    assert parts[0] == b"one"
    assert parts[-1] == b"two"
    assert 2 <= parts.count(sse.KEEP_ALIVE) <= 3
    assert list(events_of(iter(sse.KEEP_ALIVE.decode().splitlines()))) == []


def test_closing_a_stream_stops_what_feeds_it() -> None:
    closed = []

    async def endless() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"more"
                await asyncio.sleep(10)
        finally:
            closed.append(True)

    async def leave_early() -> None:
        parts = sse.with_keep_alive(endless(), 0.01)
        assert await anext(parts) == b"more"
        assert await anext(parts) == sse.KEEP_ALIVE
        await parts.aclose()  # type: ignore[attr-defined]

    asyncio.run(leave_early())
    assert closed == [True]
