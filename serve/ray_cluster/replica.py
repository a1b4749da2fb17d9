"""One replica: the models in a process of a cluster, behind a method that Ray Serve calls."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass

from ...calibrate.diffusers_logs import silence_schedulers
from ..backend import Generation, Update
from ..batching.worker import State
from ..cards import ModelCard
from ..errors import ServeError
from ..local_backend import LocalBackend
from ..served_model import load_models
from ..settings import ServeSettings
from .observer import RayObserver

log = logging.getLogger("qdit.serve")


@dataclass(frozen=True)
class About:
    """What a replica tells of itself. `images`: asked for and not made."""

    process: int
    cards: Mapping[str, ModelCard]
    images: int


class Replica:
    """`LocalBackend` as a Ray Serve deployment. The folder must be readable on this node."""

    def __init__(self, settings: ServeSettings) -> None:
        silence_schedulers()
        models = load_models(settings, log.info)
        observers = {model.card.id: RayObserver(model.card.id) for model in models}
        self._backend = LocalBackend(models, settings.limits, observers)

    async def generate(self, generation: Generation) -> AsyncIterator[Update | ServeError]:
        """As `Backend.generate`; a failure is the last item, so that it arrives as it is."""
        try:
            async with aclosing(self._backend.generate(generation)) as updates:
                async for update in updates:
                    yield update
        except ServeError as error:
            yield error

    async def about(self) -> About:
        """Now."""
        return About(os.getpid(), self._backend.cards, self._backend.images)

    async def check_health(self) -> None:
        """Ray Serve asks now and then, and replaces a replica that raises."""
        health = await self._backend.health()
        hopeless = [
            f"{name} is {state}"
            for name, state in health.states.items()
            if state in (State.FAILED.value, State.STOPPED.value)
        ]
        if not health.live or hopeless:
            raise RuntimeError(f"an engine of this replica is lost: {dict(health.states)}")

    async def __del__(self) -> None:
        await self._backend.close()
