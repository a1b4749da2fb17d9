"""`qdit-serve`: load, serve, drain."""

from __future__ import annotations

import asyncio
import logging
import os
import sys

from ..calibrate.diffusers_logs import silence_schedulers
from ..errors import InputError
from ..progress import Progress
from .served_model import load_models
from .settings import ServeSettings

# The batcher's tensor operations give the interpreter away and want it back: where the event loop
# has it, each waits for so long. Python's own 5 ms are longer than a GPU's call.
_SECONDS_BETWEEN_SWITCHES = 0.0002
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def run_serve(settings: ServeSettings, progress: Progress, log_level: int = logging.INFO) -> None:
    """Serve until told to stop. Raises `InputError` for what cannot be served."""
    require_web()
    from .web.local import make_local_app, make_ray_app
    from .web.security import KEYS_VARIABLE, read_keys
    from .web.server import Server, address_of, bind

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=log_level)
    silence_schedulers()
    keys = read_keys(settings.api_keys, os.environ.get(KEYS_VARIABLE))
    with bind(settings.host, settings.port) as bound:
        if settings.ray:
            served = make_ray_app(settings, progress.say, keys)
        else:
            models = load_models(settings, progress.say)
            served = make_local_app(settings, models, keys)

        def started() -> None:
            names = ", ".join(served.backend.cards)
            progress.say(f"serving {names} at {address_of(bound)} (stop with Ctrl-C)")
            if not keys and settings.host not in _LOOPBACK:
                progress.say("anyone who reaches this address may use it; see --api-keys")

        server = Server(
            served.app,
            served.gate,
            served.backend.close,
            drain_seconds=settings.drain_seconds,
            max_connections=settings.max_connections,
            started=started,
        )

        async def run() -> None:
            try:
                await server.serve(sockets=[bound])
            finally:
                await served.backend.close()

        sys.setswitchinterval(_SECONDS_BETWEEN_SWITCHES)
        asyncio.run(run())
    progress.say("stopped")


def require_web() -> None:
    """Raise `InputError` where the extra `serve` is not installed."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"qdit-serve needs {error.name}; install it with `pip install qdit[serve]`"
        ) from error
