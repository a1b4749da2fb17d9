"""Around every request: the key, an id, the headers of every answer, one count and one log line."""

from __future__ import annotations

import logging
import secrets
import time
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import ServeError
from .answers import error_response
from .metrics import Metrics
from .security import SECURITY_HEADERS, ApiKeys

log = logging.getLogger("qdit.serve")

# as ASGI has them; no route sets one of these
_SECURITY_HEADERS = [(name.encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]


class Around:
    """ASGI middleware. It passes messages on as they come, so that streams stream."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, metrics: Metrics) -> None:
        self._app = app
        self._keys = keys
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state: dict[str, Any] = scope.setdefault("state", {})
        request_id = state["request_id"] = secrets.token_hex(8)
        started = time.monotonic()
        status = 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = (*_SECURITY_HEADERS, (b"x-request-id", request_id.encode()))
                message["headers"] = [*message["headers"], *own]
            await send(message)

        try:
            await self._answer(scope, receive, send_on)
        except Exception:
            # a fault of ours: the client learns the id, the log the rest
            log.exception("request %s failed", request_id)
            if status == 0:
                fault = ServeError(f"an internal error; its id is {request_id}")
                await error_response(fault)(scope, receive, send_on)
        finally:
            self._count(scope, status, time.monotonic() - started)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].startswith("/v1/"):
            try:
                self._keys.check(Headers(scope=scope).get("authorization"))
            except ServeError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        """By the route's template: metrics must not grow by what clients write into paths."""
        route = str(getattr(scope.get("route"), "path", "unknown"))
        self._metrics.requests.labels(route, str(status)).inc()
        if route.startswith("/v1/"):
            log.info(
                "%s %s %s %d %.3f s %s",
                scope["state"]["request_id"],
                scope["method"],
                route,
                status,
                seconds,
                scope["state"].get("detail", ""),
            )
