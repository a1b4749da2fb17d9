"""`qdit-serve --emit-triton-repository`, from the flags to the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from google.protobuf import text_format

from qdit.errors import ArtifactError, InputError
from qdit.progress import Silent
from qdit.serve.triton.command import emit_repository
from qdit.serve.triton.config import schema_module


def emit(folder: Path, repository: Path, **flags: Any) -> None:
    emit_repository(repository, {"folder": folder} | flags, Silent())


def test_the_flags_are_the_configuration(folder: Path, tmp_path: Path) -> None:
    emit(folder, tmp_path / "models", max_batch=12, max_queue=34, threads=2, device="cpu")
    text = (tmp_path / "models" / "tiny-w4a8" / "config.pbtxt").read_text()
    config = text_format.Parse(text, schema_module().ModelConfig())
    assert config.max_batch_size == 12
    assert config.dynamic_batching.default_queue_policy.max_queue_size == 34
    assert config.parameters["intra_op_thread_count"].string_value == "2"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"port": 80}, "--port is not read with --emit-triton-repository, got 80"),
        ({"max_steps": 9}, "--max-steps is not read with"),
        ({"device": "cuda:1"}, "the device is auto, cpu or cuda, got 'cuda:1'"),
        ({"engine": "torch"}, "has none for 'torch'"),
        ({"max_batch": 1}, "--max-batch"),
    ],
    ids=["port", "steps", "device", "engine", "batch"],
)
def test_what_a_repository_does_not_hold_is_refused(
    folder: Path, tmp_path: Path, flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        emit(folder, tmp_path / "models", **flags)
    assert not (tmp_path / "models").exists()


def test_a_file_of_another_checkpoint_is_not_put_there(folder: Path, tmp_path: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    del model.metadata_props[:]
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(ArtifactError):
        emit(folder, tmp_path / "models")
    assert not (tmp_path / "models").exists()
