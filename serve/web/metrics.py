"""Prometheus metrics, in a registry of their own."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..batching.jobs import Job
from ..batching.mixer import StepReport
from ..errors import ServeError

_REQUEST_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
_CALL_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """All metrics of one server."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "qdit_requests", "Answers by route and status.", ["route", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "qdit_request_seconds",
            "Time from a generation request to the end of its answer, for status 200.",
            ["model"],
            buckets=_REQUEST_SECONDS,
            registry=registry,
        )
        self.jobs = Counter(
            "qdit_jobs", "Jobs that left the batcher, by how.", ["model", "outcome"],
            registry=registry,
        )  # fmt: skip
        self.images = Counter("qdit_images", "Finished images.", ["model"], registry=registry)
        self.queue = Gauge(
            "qdit_queue_images", "Images asked for and not made.", ["model"], registry=registry
        )
        self.calls = Histogram(
            "qdit_engine_call_seconds", "Time of one engine call.", ["model"],
            buckets=_CALL_SECONDS, registry=registry,
        )  # fmt: skip
        self.batch_rows = Histogram(
            "qdit_engine_batch_rows", "Rows of one engine call, without padding.", ["model"],
            buckets=_ROWS, registry=registry,
        )  # fmt: skip
        self.rows = Counter(
            "qdit_engine_rows", "Rows computed, by kind: served or padding.", ["model", "kind"],
            registry=registry,
        )  # fmt: skip
        self.failures = Counter(
            "qdit_engine_failures", "Engine calls that failed.", ["model"], registry=registry
        )
        self.ready = Gauge(
            "qdit_ready", "1 while requests are taken.", ["model"], registry=registry
        )

    def observer(self, model: str) -> ModelObserver:
        """Counts for one model; its series exist from the start, at 0."""
        return ModelObserver(self, model)

    def text(self, states: Mapping[str, str]) -> bytes:
        """The exposition text; `states` are the engines' at this moment."""
        for model, state in states.items():
            self.ready.labels(model).set(state in ("ready", "recovering"))
        return generate_latest(self.registry)


class ModelObserver:
    """What a worker reports, as metrics of its model."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._jobs = metrics.jobs
        self._model = model
        self._images = metrics.images.labels(model)
        self._queue = metrics.queue.labels(model)
        self._seconds = metrics.calls.labels(model)
        self._batch = metrics.batch_rows.labels(model)
        self._served = metrics.rows.labels(model, "served")
        self._padding = metrics.rows.labels(model, "padding")
        self._failures = metrics.failures.labels(model)
        for outcome in ("ok", "client_closed_request", "request_timeout", "engine_failed"):
            metrics.jobs.labels(model, outcome)

    def called(self, report: StepReport) -> None:
        self._seconds.observe(report.seconds)
        self._batch.observe(report.rows)
        self._served.inc(report.rows)
        self._padding.inc(report.padded_rows - report.rows)
        if report.error is not None:
            self._failures.inc()

    def ended(self, job: Job, error: ServeError | None) -> None:
        self._jobs.labels(self._model, "ok" if error is None else error.code).inc()
        if error is None:
            self._images.inc(job.image_count)

    def waiting(self, images: int) -> None:
        self._queue.set(images)
