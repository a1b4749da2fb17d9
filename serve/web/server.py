"""uvicorn around the app: one process, drained when it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ...errors import InputError
from .gate import Gate

log = logging.getLogger("qdit.serve")

_KEEP_ALIVE_SECONDS = 30
_SECONDS_TO_CLOSE = 2  # for connections that are only kept alive


def bind(host: str, port: int) -> socket.socket:
    """A socket at the address that does not listen yet: a taken port shows before models load.

    Raises `InputError`.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # the protocol by name: asyncio turns Nagle's algorithm off only where it reads TCP there, and
    # an answer of two writes would wait 40 ms for the client's delayed acknowledgement
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise InputError(
            f"cannot listen at {host}:{port}: {error}; choose another --host or --port"
        ) from error
    return bound


def address_of(bound: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Server(uvicorn.Server):
    """Serves until SIGTERM or SIGINT, then drains; a second signal ends it at once.

    While it drains `/health` says 503 and new generations are refused with 503; the requests that
    are inside get their images for up to `drain_seconds`. Then connections are closed.
    """

    def __init__(
        self,
        app: FastAPI,
        gate: Gate,
        close: Callable[[], Awaitable[None]],
        *,
        drain_seconds: float,
        max_connections: int,
        started: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,  # nothing here asks who the client is
                limit_concurrency=max_connections,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=_SECONDS_TO_CLOSE,
                lifespan="off",
            )
        )
        self._gate = gate
        self._close = close
        self._drain_seconds = drain_seconds
        self._tell_started = started
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told_to_stop = False
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._tell_started()

    def stop(self) -> None:
        """Drain and end; from any thread, once the server has started."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin_draining)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._told_to_stop or self._loop is None:
            log.warning("told to stop: requests inside are given up")
            self.should_exit = self.force_exit = True
        self._told_to_stop = True
        self.stop()

    def _begin_draining(self) -> None:
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        gate, seconds = self._gate, self._drain_seconds
        log.info("draining: %d requests are inside, for at most %g s", gate.inside, seconds)
        if not await gate.drain(seconds):
            log.warning("%d requests were not done in %g s and are given up", gate.inside, seconds)
        await self._close()
        self.should_exit = True
