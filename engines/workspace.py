"""Steps of a long job that survive a kill: what is finished is kept, under a key of its inputs."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files import sha256_of_json, write_json

WORK_FOLDER = ".work"
_MARKER = "done.json"


class Workspace:
    """`<output>/.work/<step>/`, one folder a step, with a marker once the step is finished.

    1. A step whose marker carries the same key is not run again.
    2. A step without a marker but with the same key goes on from the files in its folder.
    3. A step whose key differs (other flags, another model) starts from an empty folder.
    4. `resume=False` empties every folder first.
    """

    def __init__(self, output: Path, resume: bool = True) -> None:
        self.output = output
        self.folder = output / WORK_FOLDER
        self.timings: dict[str, float] = {}
        self.reused: list[str] = []
        if not resume and self.folder.exists():
            shutil.rmtree(self.folder)

    def run(self, step: str, inputs: dict[str, Any], work: Callable[[Path], object]) -> Path:
        """Run `work(folder)` unless it is already finished for these `inputs`; return the folder.

        The seconds of every run that contributed are added up in `timings[step]`.
        """
        folder = self.folder / step
        key = sha256_of_json(inputs)
        state = _read_state(folder)
        if state.get("key") != key:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            state = {"key": key, "seconds": 0.0, "finished": False}
        if state["finished"]:
            self.reused.append(step)
        else:
            self._run_timed(folder, state, work)
        self.timings[step] = state["seconds"]
        return folder

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the seconds of a step that is quick enough to run every time."""
        started = time.perf_counter()
        yield
        self.timings[step] = round(time.perf_counter() - started, 3)

    def forget(self, step: str) -> None:
        """Make the next `run` of this step start from an empty folder."""
        shutil.rmtree(self.folder / step, ignore_errors=True)

    def _run_timed(
        self, folder: Path, state: dict[str, Any], work: Callable[[Path], object]
    ) -> None:
        write_json(folder / _MARKER, state)
        started = time.perf_counter()
        try:
            work(folder)
            state["finished"] = True
        finally:
            state["seconds"] = round(state["seconds"] + time.perf_counter() - started, 3)
            write_json(folder / _MARKER, state)


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) and {"key", "seconds", "finished"} <= set(state) else {}
