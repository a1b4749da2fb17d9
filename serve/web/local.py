"""The app over engines in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import FastAPI

from ..local_backend import LocalBackend
from ..served_model import ServedModel
from ..settings import ServeSettings
from .app import AppParts, make_app
from .gate import Gate
from .metrics import Metrics
from .security import ApiKeys


@dataclass(frozen=True)
class LocalApp:
    """An app and what its server needs of it."""

    app: FastAPI
    gate: Gate
    backend: LocalBackend


def make_local_app(
    settings: ServeSettings, models: Sequence[ServedModel], keys: ApiKeys
) -> LocalApp:
    """Start a worker for each model and put the app over them."""
    metrics = Metrics()
    observers = {model.card.id: metrics.observer(model.card.id) for model in models}
    backend = LocalBackend(models, settings.limits, observers)
    gate = Gate()
    parts = AppParts(
        backend, settings.requests, keys, metrics, gate, settings.limits.request_timeout
    )
    return LocalApp(make_app(parts), gate, backend)
