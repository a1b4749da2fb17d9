"""What a served folder is refused for before any runtime reads it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from qdit.engines.kinds.kind import EngineSettings
from qdit.errors import ArtifactError, InputError
from qdit.serve.served_model import load_served


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    shutil.copytree(exported, tmp_path / "copy")
    return tmp_path / "copy"


def load(folder: Path, engine: str = "auto") -> None:
    load_served(folder, engine, EngineSettings("cpu"), None, lambda message: None)


def change(folder: Path, edit: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(folder / "model.onnx")
    edit(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def external(location: str) -> Callable[[onnx.ModelProto], None]:
    def edit(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)

    return edit


def test_a_sound_folder_loads(folder: Path) -> None:
    load(folder)


def test_a_flipped_byte_of_the_weights(folder: Path) -> None:
    path = folder / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="SHA-256 differs"):
        load(folder)


def test_a_damaged_graph(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"\x00\xff nonsense")
    with pytest.raises(ArtifactError, match="not a readable ONNX file"):
        load(folder)


def test_a_graph_of_another_checkpoint(folder: Path) -> None:
    def edit(model: onnx.ModelProto) -> None:
        for entry in model.metadata_props:
            if entry.key == "qdit.linears":
                entry.value = entry.value.replace("transformer_blocks.0", "transformer_blocks.7")

    change(folder, edit)
    with pytest.raises(ArtifactError, match="not of the checkpoint beside it"):
        load(folder)


def test_a_graph_without_a_record(folder: Path) -> None:
    change(folder, lambda model: model.ClearField("metadata_props"))
    with pytest.raises(ArtifactError, match="no record of its linears"):
        load(folder)


def test_operators_of_an_unknown_domain(folder: Path) -> None:
    change(folder, lambda model: model.opset_import.add(domain="evil.ops", version=1) and None)
    with pytest.raises(ArtifactError, match=r"domain 'evil\.ops'"):
        load(folder)


@pytest.mark.parametrize(
    "location", ["../secret", "/etc/passwd", "a/b", "..", "", "..\\secret"], ids=repr
)
def test_external_data_elsewhere(folder: Path, location: str) -> None:
    (folder.parent / "secret").write_bytes(b"x" * 10_000)
    change(folder, external(location))
    with pytest.raises(ArtifactError, match="must lie beside the file"):
        load(folder)


def test_external_data_through_a_link(folder: Path) -> None:
    (folder.parent / "secret").write_bytes(b"x" * 10_000)
    (folder / "data").symlink_to(folder.parent / "secret")
    change(folder, external("data"))
    with pytest.raises(ArtifactError, match="not a link out"):
        load(folder)


def test_a_folder_that_is_no_export(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no qdit\.json"):
        load(tmp_path)
