"""Time GPU work without its launch costs: as a CUDA graph, replayed, by CUDA's own events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], Any]

_FEWEST_IN_A_GRAPH = 8
_CACHE_BYTES = 120_000_000  # twice the second-level cache of an H200


def copies_beyond_cache(byte_size: int) -> int:
    """How many copies of an operand calls must take turns with, so that none finds it cached."""
    return max(3, min(10, _CACHE_BYTES // byte_size + 1))


def graph_microseconds(calls: Sequence[Call], repeats: int = 5) -> list[float]:
    """Microseconds a call, once for each replay of a graph that goes through `calls` in turn."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    count = max(len(calls), _FEWEST_IN_A_GRAPH)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for position in range(count):
            calls[position % len(calls)]()
    graph.replay()
    torch.cuda.synchronize()
    return [_replay_ms(graph) * 1000 / count for _ in range(repeats)]


def _replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))
