"""The plugins' kernels launched as TensorRT does: on a GPU equal to PyTorch's launch to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from qdit.calibrate.schemes import LayerScheme
from qdit.engines.kernels import driver
from qdit.engines.kernels.driver import gpu
from qdit.engines.tensorrt.plugin import driver_launch
from qdit.engines.tensorrt.plugin.driver_launch import PluginCase, cases_of

from ..kernels.test_launch import H100, SUCCESS, Recorder, recorder, use

__all__ = ["recorder"]

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SCHEMES = {
    "w4 g128": LayerScheme(4, 8, 128, 128),
    "w8 g64 a128 asymmetric": LayerScheme(8, 8, 64, 128, False, False),
    "w4 g128 integer token": LayerScheme(4, 8, 128, "token", scale_format="integer"),
    "w8 channel token": LayerScheme(8, 8, "channel", "token"),
    "w4 g64 weight-only": LayerScheme(4, 16, 64),
    "w4 g96": LayerScheme(4, 8, 96, 96),
}


# DiT-XL's, whole panels of 128, and half a one more
SHAPES = ((1152, 3456), (384, 128), (192, 128))


def divides(scheme: LayerScheme, width: int) -> bool:
    groups = (scheme.weight_group_size(width), scheme.activation_group_size(width))
    return all(width % group == 0 for group in groups)


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("rows", [16, 512])
@pytest.mark.parametrize(
    ("scheme", "width", "channels"),
    [
        pytest.param(scheme, *shape, id=f"{name}, {shape[0]} to {shape[1]}")
        for name, scheme in SCHEMES.items()
        for shape in SHAPES
        if divides(scheme, shape[0])
    ],
)
def test_every_tactic_equals_pytorch_s_launch(
    scheme: LayerScheme, rows: int, width: int, channels: int
) -> None:
    beyond = 0
    for case in cases_of(scheme, rows, width, channels, gpu(0)):
        for tactic in case.tactics():
            loaded = case.load(tactic)
            loaded.launch()
            torch.cuda.synchronize()
            expected = case.pytorch(tactic)
            written = loaded.written()
            assert len(written) == len(expected) >= 1
            for got, wanted in zip(written, expected, strict=True):
                assert torch.equal(got, wanted)
            beyond += loaded.launch_parameters.shared_bytes > 48 << 10
    if scheme.quantizes_activations and width == 1152:
        assert beyond  # the case that TensorRT must ask the driver for


class PtxRecorder(Recorder):
    """Takes PTX as well, as the driver does."""

    def cuModuleLoadData(self, code: bytes) -> tuple[Any, int]:  # noqa: N802 - the driver's name
        assert code.startswith(b"\x7fELF") or (b".version 8.0" in code and code.endswith(b"\0"))
        return SUCCESS, 1


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_both_launches_pass_the_same_without_a_gpu(
    scheme: LayerScheme, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes to the driver: kernel, grid, threads, shared memory, pointers and integers."""
    recording = PtxRecorder()
    use(monkeypatch, H100)
    monkeypatch.setattr(driver, "_driver", lambda: recording)
    monkeypatch.setattr(driver_launch, "driver_isa", lambda: (8, 0))
    for case in cases_of(scheme, 64, 1152, 256, H100, place="cpu"):
        for tactic in case.tactics():
            recording.launches.clear()
            recording.shared_bytes.clear()
            loaded = case.load(tactic)
            loaded.launch()
            case.pytorch(tactic)
            ours, theirs = recording.launches
            assert (ours.function, ours.grid, ours.threads) == (
                theirs.function,
                theirs.grid,
                theirs.threads,
            )
            assert ours.attributes == 0  # TensorRT sets none
            check_arguments(case, ours.values, theirs.values)
            assert len(set(recording.shared_bytes)) <= 1  # both ask for the same, or neither


def check_arguments(case: PluginCase, ours: Sequence[float], theirs: Sequence[float]) -> None:
    """Inputs and integers are PyTorch's; where it passes null, TensorRT passes another tensor."""
    count = len(ours) - len(case.outputs)
    for place, (one, other) in enumerate(zip(ours[:count], theirs[:count], strict=True)):
        assert one == other or (other == 0 and place < len(case.inputs)), place
    assert all(pointer != 0 for pointer in (*ours[: len(case.inputs)], *ours[count:]))
