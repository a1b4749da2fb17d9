"""How many rows one engine call should have: enough to keep the engine busy, and no more.

A call is the time slice of the batcher: whatever comes waits for the one that is running. So the
smallest size that reaches nearly the engine's best throughput is the right one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from ..calibrate.sampling import SampledModel, initial_noise
from .live_engine import LiveEngine

SIZES = (2, 4, 8, 16, 32, 64, 128)
_ENOUGH = 0.93  # of the best throughput
_RUNS = 3
_LONGEST_CALL = 1.0  # seconds: larger calls are not tried


def fitting_batch_size(
    engine: LiveEngine,
    model: SampledModel,
    batch_sizes: Sequence[int] = (),
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Time the engine at growing sizes; the smallest within 7 % of the best rows a second.

    Sizes stop growing where a call takes over a second. With `batch_sizes` only those are tried,
    and all of them, so that the engine is prepared for each.
    """
    speeds: dict[int, float] = {}
    for size in sorted(size for size in (batch_sizes or SIZES) if size >= 2):
        seconds = _seconds(engine, model, size, clock)
        speeds[size] = size / seconds
        if seconds > _LONGEST_CALL and not batch_sizes:
            break
    best = max(speeds.values())
    return next(size for size, speed in speeds.items() if speed >= _ENOUGH * best)


def _seconds(
    engine: LiveEngine, model: SampledModel, size: int, clock: Callable[[], float]
) -> float:
    """The median time of a call of `size` rows, after one that may prepare things."""
    x = initial_noise(range(size), model.sample_shape, seed=0)
    timesteps = torch.arange(size) * 997 % 1000
    labels = torch.arange(size) % model.class_count
    times = []
    for _ in range(_RUNS + 1):
        started = clock()
        engine.denoise(x, timesteps, labels)
        times.append(clock() - started)
        if len(times) > 1 and sum(times) > 2 * _LONGEST_CALL:
            break
    return statistics.median(times[1:])
