"""How many rows one engine call should have: enough to keep the engine busy, and no more.

A call is the time slice of the batcher: whatever comes waits for the one that is running. So the
smallest size that reaches nearly the engine's best throughput is the right one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from ..calibrate.sampling import SampledModel, initial_noise
from ..errors import InputError
from .live_engine import LiveEngine
from .served_model import ServedModel

SIZES = (2, 4, 8, 16, 32, 64, 128)
_ENOUGH = 0.93  # of the best throughput
_RUNS = 3
_LONGEST_CALL = 1.0  # seconds: larger calls are not tried


def fitting_batch_size(
    served: ServedModel, *, clock: Callable[[], float] = time.perf_counter
) -> int:
    """Time the engine at growing sizes; the smallest within 7 % of the best rows a second.

    Sizes stop growing where a call takes over a second. With `batch_sizes` only those are tried,
    and all of them, so that the engine is prepared for each. Raises `InputError` for an engine that
    takes no call of 2 rows.
    """
    largest = served.largest_batch or max(*SIZES, *served.batch_sizes)
    sizes = sorted(size for size in (served.batch_sizes or SIZES) if 2 <= size <= largest)
    if not sizes:
        raise InputError(
            f"guidance needs calls of 2 rows, and the engine takes at most {largest}; build it "
            "with another --batch-profile"
        )
    speeds: dict[int, float] = {}
    for size in sizes:
        seconds = _seconds(served.engine, served.sampled, size, clock)
        speeds[size] = size / seconds
        if seconds > _LONGEST_CALL and not served.batch_sizes:
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
