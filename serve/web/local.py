"""The app over engines in this process, or over replicas of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastapi import FastAPI

from ..backend import Backend
from ..local_backend import LocalBackend
from ..served_model import ServedModel
from ..settings import ServeSettings
from .app import AppParts, make_app
from .gate import Gate
from .metrics import Metrics
from .security import ApiKeys


@dataclass(frozen=True)
class ServedApp:
    """An app and what its server needs of it."""

    app: FastAPI
    gate: Gate
    backend: Backend


def make_local_app(
    settings: ServeSettings, models: Sequence[ServedModel], keys: ApiKeys
) -> ServedApp:
    """Start a worker for each model and put the app over them."""
    metrics = Metrics()
    observers = {model.card.id: metrics.observer(model.card.id) for model in models}
    return _served(settings, LocalBackend(models, settings.limits, observers), metrics, keys)


def make_ray_app(settings: ServeSettings, say: Callable[[str], None], keys: ApiKeys) -> ServedApp:
    """Start replicas on a Ray cluster and put the app over them; they count their own calls."""
    from ..ray_cluster.deploy import deploy

    return _served(settings, deploy(settings, say), Metrics(), keys)


def _served(
    settings: ServeSettings, backend: Backend, metrics: Metrics, keys: ApiKeys
) -> ServedApp:
    gate = Gate()
    parts = AppParts(
        backend, settings.requests, keys, metrics, gate, settings.limits.request_timeout
    )
    return ServedApp(make_app(parts), gate, backend)
