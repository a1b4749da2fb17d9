"""What a replica's worker reports, as metrics that Ray exports on every node."""

from __future__ import annotations

from typing import Any

from ..batching.jobs import Job
from ..batching.mixer import StepReport
from ..errors import ServeError

_CALL_SECONDS = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]
_ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256]


class RayObserver:
    """Counts for one model; Ray adds the replica's own labels, and the prefix 'ray_'."""

    def __init__(self, model: str) -> None:
        from ray.serve import metrics

        def made(kind: Any, name: str, told: str, tags: tuple[str, ...] = (), **more: Any) -> Any:
            metric = kind(name, description=told, tag_keys=("model", *tags), **more)
            metric.set_default_tags({"model": model})
            return metric

        self._jobs = made(
            metrics.Counter, "qdit_jobs", "Jobs that left the batcher, by how.", ("outcome",)
        )
        self._images = made(metrics.Counter, "qdit_images", "Finished images.")
        self._queue = made(metrics.Gauge, "qdit_queue_images", "Images asked for and not made.")
        self._seconds = made(
            metrics.Histogram, "qdit_engine_call_seconds", "Time of one engine call.",
            boundaries=_CALL_SECONDS,
        )  # fmt: skip
        self._rows = made(
            metrics.Histogram, "qdit_engine_batch_rows", "Rows of one engine call, unpadded.",
            boundaries=_ROWS,
        )  # fmt: skip
        self._failures = made(metrics.Counter, "qdit_engine_failures", "Engine calls that failed.")

    def called(self, report: StepReport) -> None:
        self._seconds.observe(report.seconds)
        self._rows.observe(report.rows)
        if report.error is not None:
            self._failures.inc()

    def ended(self, job: Job, error: ServeError | None) -> None:
        self._jobs.inc(tags={"outcome": "ok" if error is None else error.code})
        if error is None:
            self._images.inc(job.image_count)

    def waiting(self, images: int) -> None:
        self._queue.set(images)
