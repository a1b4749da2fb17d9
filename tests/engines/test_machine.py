"""The description of the machine that goes beside every figure."""

from __future__ import annotations

import importlib.metadata
import json

import psutil
import pytest

from qdit.engines import machine


def test_the_description_is_json_and_agrees_with_the_system() -> None:
    value = machine.describe_machine()
    assert json.loads(json.dumps(value)) == value
    assert value["memory_bytes"] == psutil.virtual_memory().total
    assert 1 <= value["cores"] <= (psutil.cpu_count() or 1)
    assert value["versions"]["torch"] == importlib.metadata.version("torch")
    assert value["cpu"] in value["summary"]


def test_libraries_that_are_not_installed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LIBRARIES", ("torch", "no-such-library-here"))
    assert set(machine.library_versions()) == {"torch"}


def test_a_machine_without_nvidia_tools_has_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_GPU_QUERY", ("no-such-program-here",))
    assert machine.describe_machine()["gpus"] == []


def test_gpus_are_read_from_the_drivers_table(monkeypatch: pytest.MonkeyPatch) -> None:
    # the form of `nvidia-smi --format=csv,noheader,nounits`
    monkeypatch.setattr(machine, "_GPU_QUERY", ("echo", "NVIDIA H200, 580.82.07, 143771"))
    value = machine.describe_machine()
    assert value["gpus"] == [
        {"name": "NVIDIA H200", "driver": "580.82.07", "memory_bytes": 143771 * 2**20}
    ]
    assert value["summary"].endswith(", NVIDIA H200")
