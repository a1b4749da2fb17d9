"""TensorRT engines as kinds that a server opens, on the stand-in for TensorRT."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qdit.engines.at_hand import open_engine
from qdit.engines.kinds import tensorrt_kinds
from qdit.engines.kinds.kind import EngineSettings
from qdit.engines.tensorrt.settings import BatchProfile, BuildSettings
from qdit.engines.tensorrt.store import manifest_path, stored_engine
from qdit.errors import ArtifactError, InputError
from qdit.progress import Silent

from ...export.conftest import example_arrays
from ...export.tensorrt.conftest import Traced
from .conftest import Fake

SETTINGS = BuildSettings(BatchProfile(1, 2, 4))


@pytest.fixture
def exported(newest: Fake, int8_files: dict[bool, Path], tmp_path: Path) -> Path:
    """A folder whose `tensorrt-int8` engine was built."""
    (tmp_path / "tensorrt").mkdir()
    path = Path(shutil.copy(int8_files[True], tmp_path / "tensorrt" / "tensorrt-int8.onnx"))
    stored_engine(path, SETTINGS, newest.features, Silent())
    return tmp_path


def test_a_built_engine_opens_and_tells_its_limit(exported: Path, traced: Traced) -> None:
    opened = open_engine(exported, "tensorrt-int8")
    assert opened.kind.largest_batch(opened.engine) == 4
    assert opened.engine.infer(example_arrays(traced.model, 3))["sample"].shape[0] == 3


def test_auto_takes_what_is_exact_before_it(exported: Path) -> None:
    said: list[str] = []
    assert open_engine(exported, say=said.append).kind is tensorrt_kinds.INT8  # nothing else there
    assert [line.split(" passed over")[0] for line in said] == [
        "engine tensorrt-plugin", "engine torch", "engine onnxruntime-cuda", "engine onnxruntime",
        "engine qdq",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["tensorrt-int8.engine", "tensorrt-int8.onnx"])
def test_bytes_that_are_not_those_recorded_are_never_read(exported: Path, name: str) -> None:
    file = exported / "tensorrt" / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=f"{name} is not what its engine's manifest records"):
        open_engine(exported, "tensorrt-int8")


def test_an_unfinished_engine(exported: Path) -> None:
    manifest_path(exported / "tensorrt" / "tensorrt-int8.engine").unlink()
    with pytest.raises(ArtifactError, match="is no finished engine; build it again"):
        open_engine(exported, "tensorrt-int8")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("tensorrt", "10.0.1", r"tensorrt 10\.0\.1 → "),
        ("preview_features", ["SOMETHING_0805"], "preview_features "),
    ],
)
def test_an_engine_of_another_tensorrt_is_not_read(
    exported: Path, name: str, value: object, words: str
) -> None:
    path = manifest_path(exported / "tensorrt" / "tensorrt-int8.engine")
    recorded = json.loads(path.read_text())
    path.write_text(json.dumps({**recorded, name: value}))
    with pytest.raises(ArtifactError, match=f"built for another TensorRT .*{words}"):
        open_engine(exported, "tensorrt-int8")


def test_what_it_needs(exported: Path) -> None:
    with pytest.raises(InputError, match=r"has no tensorrt/tensorrt-plugin\.engine"):
        open_engine(exported, "tensorrt-plugin")
    with pytest.raises(InputError, match="it runs on cuda:0, not on cpu"):
        open_engine(exported, "tensorrt-int8", EngineSettings("cpu"))


def test_without_tensorrt(tmp_path: Path) -> None:
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt" / "tensorrt-int4.engine").write_bytes(b"")
    with pytest.raises(InputError, match=r"TensorRT is not installed here|no NVIDIA GPU"):
        open_engine(tmp_path, "tensorrt-int4")
