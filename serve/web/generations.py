"""POST /v1/images/generations, answered at once or as a stream; a client that leaves cancels."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import ExitStack
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic import ValidationError
from starlette.types import Receive, Scope, Send

from ..backend import Backend, Generation, ImageUpdate, ProgressUpdate, Update
from ..cards import ModelCard, find_card
from ..errors import BadRequestError, ClientGoneError, ServeError
from ..settings import RequestLimits
from . import sse
from .answers import error_body
from .gate import Gate
from .schema import (
    Image,
    ImageEvent,
    ImageRequest,
    ImagesResponse,
    ProgressEvent,
    generation_of,
    usage_of,
)
from .security import read_json_body

_SECONDS_BETWEEN_SIGNS = 10.0


class Generations:
    """Answers generation requests with what the backend makes."""

    def __init__(
        self,
        backend: Backend,
        limits: RequestLimits,
        body_model: type[ImageRequest],
        request_timeout: float,
        gate: Gate,
        finished: Callable[[str, float], None],
    ) -> None:
        self._backend = backend
        self._limits = limits
        self._body_model = body_model
        self._request_timeout = request_timeout
        self._gate = gate
        self._finished = finished  # (model id, seconds) of answers that were complete

    async def answer(self, request: Request) -> Response:
        """The whole answer, or the start of a stream. Raises a `ServeError`."""
        started = time.monotonic()
        body = self._parsed(await read_json_body(request, self._limits))
        card = find_card(self._backend.cards, body.model)
        generation = generation_of(
            body, card, self._limits, request.state.request_id, self._request_timeout
        )
        request.state.detail = _detail(generation, body.user)
        with ExitStack() as stack:
            stack.enter_context(self._gate)
            updates = self._backend.generate(generation)
            first = await anext(updates)  # refusals come before the stream begins
            if body.stream:
                parts = self._events(updates, first, generation, card, started)
                return EventStream(parts, updates, stack.pop_all())
            images = await _unless_gone(_collect(updates), request)
        self._finished(card.id, time.monotonic() - started)
        answer = _response(images, generation, card).model_dump_json()
        return Response(answer, media_type="application/json")

    def _parsed(self, data: bytes) -> ImageRequest:
        try:
            return self._body_model.model_validate_json(data)
        except ValidationError as error:
            raise _as_bad_request(error) from error

    async def _events(
        self,
        updates: AsyncIterator[Update],
        first: Update,
        generation: Generation,
        card: ModelCard,
        started: float,
    ) -> AsyncIterator[bytes]:
        yield _event_of(first, generation, card)
        try:
            async for update in updates:
                yield _event_of(update, generation, card)
        except ServeError as error:
            yield sse.error_event(error_body(error))
        else:
            self._finished(card.id, time.monotonic() - started)


class EventStream(StreamingResponse):
    """A stream of events; it ends at once when the client leaves, and closes `updates` and `stack`
    however it ends."""

    def __init__(
        self, parts: AsyncIterator[bytes], updates: AsyncIterator[Update], stack: ExitStack
    ) -> None:
        whole = sse.with_keep_alive(parts, _SECONDS_BETWEEN_SIGNS)
        super().__init__(whole, media_type="text/event-stream", headers=sse.HEADERS)
        self._updates = updates
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = asyncio.ensure_future(self.stream_response(send))
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait({stream, gone}, return_when=asyncio.FIRST_COMPLETED)
            if stream.done():
                stream.result()
        finally:
            with self._stack:
                await _end(stream, gone)
                await _close(self._updates)


async def _unless_gone(work: Coroutine[Any, Any, list[bytes]], request: Request) -> list[bytes]:
    """The work's result; it is cancelled, and `ClientGoneError` raised, when the client leaves."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError("the client went away")
    finally:
        await _end(task, gone)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _close(updates: AsyncIterator[Update]) -> None:
    if isinstance(updates, AsyncGenerator):
        await updates.aclose()


async def _collect(updates: AsyncIterator[Update]) -> list[bytes]:
    """The finished images in order."""
    images: dict[int, bytes] = {}
    try:
        async for update in updates:
            if isinstance(update, ImageUpdate) and update.preview is None:
                images[update.image] = update.data
    finally:
        await _close(updates)
    return [images[number] for number in sorted(images)]


def _response(images: list[bytes], generation: Generation, card: ModelCard) -> ImagesResponse:
    return ImagesResponse(
        created=int(time.time()),
        model=card.id,
        size=card.size,
        output_format=generation.image_format,
        num_inference_steps=generation.steps,
        guidance_scale=generation.guidance,
        scheduler=generation.scheduler or card.default_scheduler,
        data=[
            Image(
                b64_json=base64.b64encode(data).decode(),
                index=number,
                seed=generation.seed,
                label=generation.label,
                class_name=card.class_label(generation.label),
            )
            for number, data in enumerate(images)
        ],
        usage=usage_of(card, len(images)),
    )


def _event_of(update: Update, generation: Generation, card: ModelCard) -> bytes:
    if isinstance(update, ProgressUpdate):
        return sse.event(
            ProgressEvent(step=update.step, steps=update.steps, eta_seconds=update.eta)
        )
    is_preview = update.preview is not None
    return sse.event(
        ImageEvent(
            type="image_generation.partial_image" if is_preview else "image_generation.completed",
            b64_json=base64.b64encode(update.data).decode(),
            created_at=int(time.time()),
            size=card.size,
            output_format=generation.image_format,
            partial_image_index=update.preview,
            usage=None if is_preview else usage_of(card, 1),
            model=card.id,
            index=update.image,
            seed=generation.seed,
            label=generation.label,
            class_name=card.class_label(generation.label),
        )
    )


def _detail(generation: Generation, user: str | None) -> str:
    who = f" user={user!r}" if user else ""
    return (
        f"model={generation.model} label={generation.label} n={generation.images} "
        f"steps={generation.steps} guidance={generation.guidance:g} seed={generation.seed}{who}"
    )


def _as_bad_request(error: ValidationError) -> BadRequestError:
    """OpenAI's error for pydantic's first complaint; what was sent is not repeated at length."""
    first = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(str(part)[:60] for part in first["loc"])
    if first["type"] == "json_invalid":
        return BadRequestError(f"the body is not JSON: {first['msg'][:200]}", None, "invalid_json")
    if first["type"] == "extra_forbidden":
        known = ", ".join(ImageRequest.model_fields)
        message = f"unknown field {field!r}; known are {known}"
        return BadRequestError(message, field, "unknown_parameter")
    if field == "response_format":
        return BadRequestError("response_format must be b64_json: nothing is stored here", field)
    got = repr(first["input"])
    got = got if len(got) <= 80 else got[:79] + "…"
    where = f"{field}: " if field else ""
    return BadRequestError(f"{where}{first['msg']}, got {got}", field or None)
