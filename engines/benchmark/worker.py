"""A target's own process: reads one JSON request a line, answers one JSON line each.

Own process, so that peak memory is this target's alone, its thread pools disturb nobody, and its
crash costs only its row. Started as `python -m qdit.engines.benchmark.worker`.

Requests: {"op": "load", "registration", "prepared", "settings"} · {"op": "bind", "inputs",
"output", "warm_up"} · {"op": "run"} · {"op": "profile"}. Answers: {"ok": {…}} or {"error": "…"}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from ...errors import QditError
from .memory import PeakMemory
from .registry import Registration
from .target import NamesProducts, Prepared, Profiled, Runner, RunSettings

# Runs faster than this are preceded by an untimed one: the other targets' turns have emptied the
# caches, and a sampling loop calls the same target again and again.
REWARM_BELOW_S = 0.2


class Worker:
    """State of one worker: the loaded target and its memory meter."""

    def __init__(self) -> None:
        self.memory = PeakMemory()
        self.runner: Runner | None = None
        self.last_s = 0.0

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        started = time.perf_counter()
        target = Registration(**request["registration"]).load()
        self.runner = target.load(
            Prepared(**request["prepared"]), RunSettings(**request["settings"])
        )
        return {
            "seconds": time.perf_counter() - started,
            "device": self.runner.device,
            "weight_bytes": self.runner.weight_bytes,
            "products": self.runner.products if isinstance(self.runner, NamesProducts) else None,
            "load_peak_memory_bytes": self.memory.peak(),
        }

    def bind(self, request: dict[str, Any]) -> dict[str, Any]:
        runner = self._loaded()
        runner.bind(load_file(request["inputs"]))
        first_s = self._timed(runner)
        for _ in range(request["warm_up"] - 1):
            self._timed(runner)
        np.save(request["output"], runner.output())
        # compiling happens in the first run: its memory is not what a run needs
        self.memory.reset()
        return {"first_run_s": first_s, "run_s": self.last_s}

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        runner = self._loaded()
        if self.last_s < REWARM_BELOW_S:
            runner.run()
        seconds = self._timed(runner)
        return {
            "seconds": seconds,
            "peak_memory_bytes": self.memory.peak(),
            "peak_device_memory_bytes": runner.device_memory(),
        }

    def profile(self, request: dict[str, Any]) -> dict[str, Any]:
        runner = self._loaded()
        if not isinstance(runner, Profiled):
            return {"operators": None}
        return {"operators": [entry.to_json() for entry in runner.profile()]}

    def _timed(self, runner: Runner) -> float:
        started = time.perf_counter()
        runner.run()
        self.last_s = time.perf_counter() - started
        return self.last_s

    def _loaded(self) -> Runner:
        if self.runner is None:
            raise RuntimeError("the worker was asked to run before it was asked to load")
        return self.runner


def describe(error: BaseException) -> str:
    """One line: the project's own errors as they are, others with their type."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return text if isinstance(error, QditError) else f"{type(error).__name__}: {text}"


def serve() -> None:
    """Answer requests until stdin closes. What libraries print to stdout goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker()
    operations: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "load": worker.load,
        "bind": worker.bind,
        "run": worker.run,
        "profile": worker.profile,
    }
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer: dict[str, Any] = {"ok": operations[request["op"]](request)}
        except Exception as error:  # whatever a library raises belongs in this target's row
            answer = {"error": describe(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
