"""Stand-in targets, in a module of their own so that real worker processes can import them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdit.engines.benchmark import registry
from qdit.engines.benchmark.registry import Registration

MODULE = '''
"""Targets of one class each: what they do is said in their names."""

import os
import signal
import time
from pathlib import Path

import numpy as np

from qdit.engines.benchmark.target import Prepared
from qdit.errors import InputError


class Base:
    """Doubles its input; notes every run in a log that all targets share."""

    scale = 2.0
    seconds = 0.001
    weight_bytes = 10
    device = "cpu"

    def prepare(self, subject, folder):
        self.folder = folder
        return Prepared({"log": str(folder.parent / "log")}, 1000)

    def load(self, prepared, settings):
        self.log = Path(prepared.settings["log"])
        return self

    def bind(self, inputs):
        self.inputs = inputs

    def run(self):
        with self.log.open("a") as log:
            log.write(type(self).__name__ + "\\n")
        time.sleep(self.seconds)

    def output(self):
        return self.scale * next(iter(self.inputs.values()))

    def device_memory(self):
        return None


class Plain(Base):
    pass


class Slower(Base):
    scale = 2.5
    seconds = 0.03


class HasNoFiles(Base):
    def prepare(self, subject, folder):
        return Prepared({"log": str(folder.parent / "log")})


class Chatty(Base):
    def run(self):
        print("a library's remark")
        os.write(1, b"{not json\\n")
        super().run()


class HoldsMemory(Base):
    def run(self):
        super().run()
        self.held = np.ones(25_000_000)  # 200 MB


class FailsToPrepare(Base):
    def prepare(self, subject, folder):
        raise InputError("no such model; name another")


class FailsToLoad(Base):
    def load(self, prepared, settings):
        raise ImportError("No module named 'runtime'\\nsecond line")


class FailsToRun(Base):
    def run(self):
        raise RuntimeError("the product is undefined")


class DiesInTheThirdTurn(Base):
    turns = 0

    def run(self):
        super().run()
        self.turns += 1
        if self.turns == 6:  # two to warm up, then an untimed and a timed one a turn
            os.kill(os.getpid(), signal.SIGKILL)


class Exits(Base):
    def run(self):
        os.write(2, b"first line\\ncannot continue\\n")
        os._exit(7)
'''


class FakeSubject:
    """Inputs and nothing else: the stand-in targets need no model."""

    def __init__(self) -> None:
        self.released = False

    def inputs(self, batch: int) -> dict[str, np.ndarray]:
        return {"x": np.arange(batch * 6, dtype=np.float32).reshape(batch, 2, 3)}

    def release(self) -> None:
        self.released = True

    def facts(self) -> dict[str, Any]:
        return {"model": "fake", "plan": {"bits": "w4a8"}}


@pytest.fixture
def subject() -> FakeSubject:
    return FakeSubject()


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Registration]]:
    """A function that registers stand-in targets by class name and returns their registrations."""
    folder = tmp_path / "import"
    folder.mkdir()
    (folder / "stand_in_targets.py").write_text(MODULE, "utf-8")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))  # for the workers

    def make(*names: str) -> list[Registration]:
        found = [Registration(name, f"stand_in_targets:{name}", "", False) for name in names]
        for registration in found:
            monkeypatch.setitem(registry.TARGETS, registration.name, registration)
        return found

    return make
