"""A benchmark's figures: one row a target and batch size, and the JSON they become."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...files import write_json
from .operator_times import OperatorTime


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one denoiser call, over the timed runs."""

    median: float
    min: float
    max: float
    runs: int

    @classmethod
    def of(cls, seconds: list[float]) -> Latency:
        """Statistics of at least one timed run."""
        times = [1000 * value for value in seconds]
        return cls(statistics.median(times), min(times), max(times), len(times))

    def to_json(self) -> dict[str, Any]:
        return {"median": self.median, "min": self.min, "max": self.max, "runs": self.runs}


@dataclass
class Row:
    """One target at one batch size. A target that failed has `error` and no latency.

    `images_per_s` is batch / median latency of one denoiser call; a sampler of n steps makes an
    n-th of it (half of that again under classifier-free guidance). Memory is the worker process's
    resident peak during the timed runs, its libraries and weights included; device memory is what
    torch allocated on the accelerator. `products` says what multiplies grouped weights and
    activations on a CPU, None where a target has none. `profile` is where a call's time goes by
    kind of operator; None where it was not asked for, or the runtime does not tell.
    """

    target: str
    batch: int
    latency: Latency | None = None
    peak_memory_bytes: int | None = None
    file_bytes: int | None = None
    error: str | None = None
    device: str | None = None
    products: str | None = None
    load_s: float | None = None
    load_peak_memory_bytes: int | None = None
    first_run_ms: float | None = None
    peak_device_memory_bytes: int | None = None
    relative_difference_to_first: float | None = None
    profile: list[OperatorTime] | None = None

    @property
    def images_per_s(self) -> float | None:
        return None if self.latency is None else 1000 * self.batch / self.latency.median

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "batch": self.batch,
            "latency_ms": None if self.latency is None else self.latency.to_json(),
            "images_per_s": self.images_per_s,
            "peak_memory_bytes": self.peak_memory_bytes,
            "file_bytes": self.file_bytes,
            "error": self.error,
            "device": self.device,
            "products": self.products,
            "load_s": self.load_s,
            "load_peak_memory_bytes": self.load_peak_memory_bytes,
            "first_run_ms": self.first_run_ms,
            "peak_device_memory_bytes": self.peak_device_memory_bytes,
            "relative_difference_to_first": self.relative_difference_to_first,
            "profile": None if self.profile is None else [e.to_json() for e in self.profile],
        }


@dataclass
class BenchmarkResults:
    """All rows of one run, in the order asked for: by batch size, then by target."""

    machine: dict[str, Any]
    command: str
    rows: list[Row]
    settings: dict[str, Any] = field(default_factory=dict)

    def first_of(self, batch: int) -> Row:
        """The row that the others of this batch size are compared with."""
        return next(row for row in self.rows if row.batch == batch)

    def speedup(self, row: Row) -> float | None:
        """The first target's median latency over this one's; above 1 is faster than the first."""
        first = self.first_of(row.batch).latency
        if first is None or row.latency is None:
            return None
        return first.median / row.latency.median

    def memory_ratio(self, row: Row) -> float | None:
        """This target's peak memory over the first one's."""
        return _ratio(row.peak_memory_bytes, self.first_of(row.batch).peak_memory_bytes)

    def size_ratio(self, row: Row) -> float | None:
        """This target's file bytes over the first one's."""
        return _ratio(row.file_bytes, self.first_of(row.batch).file_bytes)

    def to_json(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            "command": self.command,
            "settings": self.settings,
            "results": [row.to_json() for row in self.rows],
        }

    def write(self, path: Path) -> None:
        """Write the JSON, atomically."""
        write_json(path, self.to_json())


def _ratio(value: int | None, base: int | None) -> float | None:
    return value / base if value is not None and base else None
