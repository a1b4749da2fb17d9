"""Target names: what is known, what is refused, and that every registered class is there."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qdit.engines.benchmark.registry import TARGETS, registrations
from qdit.errors import InputError

KNOWN = (
    "fp32, fp16, qdq, qdq-packed, onnxruntime, onnxruntime-cuda, tensorrt-fp16, "
    "tensorrt-plugin, tensorrt-int8, tensorrt-int4, torch, torch-bf16, torch-compile, "
    "torch-quantized, torch-simulation, ort-dynamic, torchao-int8, openvino, openvino-int8"
)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        pytest.param((), f"name at least one target; the targets are {KNOWN}", id="none"),
        pytest.param(("gpu",), f"unknown target 'gpu'; the targets are {KNOWN}", id="unknown"),
        pytest.param(("qdq", "qdq"), "target 'qdq' is named twice", id="repeated"),
    ],
)
def test_wrong_names_are_refused(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        registrations(names)


def test_the_order_is_the_callers() -> None:
    assert [found.name for found in registrations(("torch", "fp32"))] == ["torch", "fp32"]


@pytest.mark.parametrize("name", list(TARGETS))
def test_every_registered_target_can_be_imported(name: str) -> None:
    target = TARGETS[name].load()
    assert callable(target.prepare)
    assert callable(target.load)


def test_a_worker_of_an_onnx_target_does_not_load_torch() -> None:
    code = """
import sys
import qdit.engines.benchmark.worker
import qdit.engines.onnxruntime_engine
from qdit.engines.benchmark.registry import TARGETS
TARGETS["qdq"].load()
TARGETS["onnxruntime"].load()
TARGETS["openvino-int8"].load()
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # its 300 MB and its thread pools would be counted as the target's
    assert done.stdout.strip() == "False"
