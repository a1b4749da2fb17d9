"""The parent's side of a worker: start it, ask it, and turn its death into one target's error."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict
from types import TracebackType
from typing import Any

from .registry import Registration
from .target import Prepared, RunSettings

# torch.compile of a full DiT-XL/2 on two cores takes minutes; past this something hangs.
ANSWER_LIMIT_S = 1800.0
_WORKER = ("-m", "qdit.engines.benchmark.worker")


class TargetFailedError(Exception):
    """This target has no figure; the message is its row's error."""


class WorkerHandle:
    """One running worker. Use as a context manager: leaving ends the process."""

    def __init__(self, registration: Registration, settings: RunSettings) -> None:
        self.registration = registration
        self.settings = settings
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in __exit__)
        self._process = subprocess.Popen(
            [sys.executable, *_WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
            env=worker_environment(settings.threads),
        )
        self._answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> WorkerHandle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process now; asking again fails."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._errors.close()

    def load(self, prepared: Prepared) -> dict[str, Any]:
        """Load the target; returns seconds, device, weight_bytes, products,
        load_peak_memory_bytes."""
        return self._ask(
            "load",
            registration=asdict(self.registration),
            prepared=asdict(prepared),
            settings=asdict(self.settings),
        )

    def bind(self, inputs: str, output: str, warm_up: int) -> dict[str, Any]:
        """Give it inputs (.safetensors), run `warm_up` times and save the output (.npy)."""
        return self._ask("bind", inputs=inputs, output=output, warm_up=warm_up)

    def run(self) -> dict[str, Any]:
        """One timed run; returns seconds and peak memory."""
        return self._ask("run")

    def profile(self) -> list[dict[str, Any]] | None:
        """Where a call's time goes (`OperatorTime` as JSON); None where the runtime is silent."""
        found: list[dict[str, Any]] | None = self._ask("profile")["operators"]
        return found

    def _read(self) -> None:
        stream = self._process.stdout
        if stream is not None:
            try:
                for line in stream:
                    self._answers.put(line)
            except ValueError:  # closed while reading: close() was called
                pass
        self._answers.put(None)

    def _ask(self, operation: str, **values: Any) -> dict[str, Any]:
        stdin = self._process.stdin
        try:
            if stdin is None:
                raise BrokenPipeError
            stdin.write(json.dumps({"op": operation, **values}) + "\n")
            stdin.flush()
            line = self._answers.get(timeout=ANSWER_LIMIT_S)
        except BrokenPipeError:
            line = None
        except queue.Empty as error:
            raise TargetFailedError(
                f"no answer to {operation} within {ANSWER_LIMIT_S:.0f} s"
            ) from error
        if line is None:
            raise TargetFailedError(f"the worker died during {operation}: {self._cause_of_death()}")
        answer = json.loads(line)
        if "error" in answer:
            raise TargetFailedError(answer["error"])
        result: dict[str, Any] = answer["ok"]
        return result

    def _cause_of_death(self) -> str:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return "killed by the system (SIGKILL), most likely out of memory"
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"exit code {code}" + (f", {lines[-1]}" if lines else "")


def worker_environment(threads: int) -> dict[str, str]:
    """The parent's environment with every thread pool at `threads`.

    PYTHONSAFEPATH keeps the current folder off the import path: a `torch.py` lying there must not
    be what is measured.
    """
    pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    own = {"PYTHONSAFEPATH": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return os.environ | {name: str(threads) for name in pools} | own
