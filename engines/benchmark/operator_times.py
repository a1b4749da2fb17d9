"""Where a call's time goes, by kind of operator, as the runtimes' own profilers say."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_KERNEL = "_kernel_time"


@dataclass(frozen=True)
class OperatorTime:
    """One kind of operator: milliseconds of one denoiser call, and how many of it there are."""

    operator: str
    ms: float
    count: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def from_onnxruntime(path: Path, warm_up: int) -> list[OperatorTime]:
    """Read a profile that ONNX Runtime wrote; the first `warm_up` calls do not count.

    Each node has its median over the calls, and a kind the sum of its nodes: an interruption by
    another process then does not make an operator look slow. Longest first.
    """
    events = json.loads(path.read_text(encoding="utf-8"))
    durations: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and str(event["name"]).endswith(_KERNEL):
            durations[event["args"]["op_name"], event["name"]].append(event["dur"] / 1000)
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for (operator, _), times in durations.items():
        counted = times[warm_up:]
        if counted:
            sums[operator] += statistics.median(counted)
            counts[operator] += 1
    return _longest_first([OperatorTime(name, ms, counts[name]) for name, ms in sums.items()])


def from_torch(averages: Sequence[Any], runs: int, *, on_gpu: bool) -> list[OperatorTime]:
    """From torch.profiler's key_averages() over `runs` calls: time in an operator itself, without
    those that it calls; on a GPU the kernels' time."""
    made = []
    for entry in averages:
        spent = entry.self_device_time_total if on_gpu else entry.self_cpu_time_total
        if spent > 0:
            made.append(OperatorTime(entry.key, spent / 1000 / runs, round(entry.count / runs)))
    return _longest_first(made)


def _longest_first(times: list[OperatorTime]) -> list[OperatorTime]:
    return sorted(times, key=lambda entry: -entry.ms)
