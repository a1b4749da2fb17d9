"""Server-sent events (WHATWG HTML, section 9.2): from updates to the bytes of a stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from pydantic import BaseModel

HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}  # proxies must not hold it back
KEEP_ALIVE = b": still here\n\n"


def event(value: BaseModel) -> bytes:
    """One event named by the value's `type`, as OpenAI does."""
    kind: Any = value.model_dump()["type"]
    return f"event: {kind}\ndata: {value.model_dump_json(exclude_none=False)}\n\n".encode()


def error_event(body: dict[str, Any]) -> bytes:
    """The event that ends a stream in which something failed; OpenAI's client raises it."""
    return f"event: error\ndata: {json.dumps(body)}\n\n".encode()


async def with_keep_alive(parts: AsyncIterator[bytes], seconds: float) -> AsyncIterator[bytes]:
    """`parts`, and a comment whenever there was none for `seconds`.

    Writing is how a server learns that the other side has gone.
    """
    pending: asyncio.Task[bytes | None] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(_next(parts))
            done, _ = await asyncio.wait({pending}, timeout=seconds)
            if not done:
                yield KEEP_ALIVE
                continue
            part, pending = pending.result(), None
            if part is None:
                return
            yield part
    finally:
        if pending is not None:
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)


async def _next(parts: AsyncIterator[bytes]) -> bytes | None:
    return await anext(parts, None)
