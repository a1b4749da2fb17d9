"""TensorRT targets of the benchmark, on the stand-in: their files, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdit.calibrate.schemes import LayerScheme
from qdit.engines.benchmark.registry import TARGETS
from qdit.engines.benchmark.target import Prepared, RunSettings
from qdit.errors import InputError

from ...export.conftest import example_arrays, make_small_model
from ...export.tensorrt.conftest import checkpoint_of
from ..tensorrt.conftest import Fake, newest

__all__ = ["newest"]

CUDA = RunSettings("cuda", 1)


class Subject:
    """A one-block model, quantized in `folder`."""

    def __init__(self, folder: Path, scheme: LayerScheme) -> None:
        self.model = make_small_model(1)
        self.folder = folder
        checkpoint, _ = checkpoint_of(self.model, scheme)
        checkpoint.write(folder)

    def full_precision(self) -> Any:
        return self.model

    def quantized_folder(self) -> Path:
        return self.folder

    def inputs(self, batch: int) -> dict[str, np.ndarray]:
        return example_arrays(self.model, batch)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("tensorrt-fp16", LayerScheme(8, 8, "channel", "token")),
        ("tensorrt-int8", LayerScheme(8, 8, "channel", "token")),
        ("tensorrt-int4", LayerScheme(4, 16, 64)),
    ],
)
def test_an_engine_is_made_loaded_and_run(
    name: str, scheme: LayerScheme, newest: Fake, tmp_path: Path
) -> None:
    subject, work = Subject(tmp_path / "checkpoint", scheme), tmp_path / "work"
    work.mkdir()
    target = TARGETS[name].load()
    prepared = target.prepare(subject, work)  # type: ignore[arg-type]
    engine = Path(prepared.settings["engine"])
    assert engine.is_relative_to(work)
    assert prepared.file_bytes == engine.stat().st_size
    runner = target.load(Prepared(prepared.settings), CUDA)
    outputs = []
    for batch in (2, 1):
        runner.bind(subject.inputs(batch))
        runner.run()
        runner.run()
        outputs.append(runner.output())
    assert [output.shape for output in outputs] == [(2, 6, 16, 16), (1, 6, 16, 16)]
    assert all(np.isfinite(output).all() and output.std() > 0 for output in outputs)


def test_a_plan_that_the_target_cannot_run(newest: Fake, tmp_path: Path) -> None:
    subject = Subject(tmp_path, LayerScheme(4, 8, 64, 64))
    with pytest.raises(InputError, match=r"tensorrt-int8 cannot run .* use --group-size channel"):
        TARGETS["tensorrt-int8"].load().prepare(subject, tmp_path)  # type: ignore[arg-type]


def test_without_tensorrt(tmp_path: Path) -> None:
    subject = Subject(tmp_path, LayerScheme(4, 16, 64))
    with pytest.raises(InputError, match="TensorRT is not installed here"):
        TARGETS["tensorrt-int4"].load().prepare(subject, tmp_path)  # type: ignore[arg-type]


def test_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="TensorRT runs on a GPU, got --device cpu"):
        TARGETS["tensorrt-int8"].load().load(Prepared({"engine": "x"}), RunSettings("cpu", 1))
