"""Files and paths of a hostile checkpoint: absent, linked, no files at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from qdit.calibrate import artifact_errors as errors
from qdit.calibrate.checkpoint import QuantizedCheckpoint

Q0 = "transformer_blocks.0.attn1.to_q"


def test_the_original_is_sound(victim: Any) -> None:
    assert victim.read().weights[Q0].bits == 3
    victim.put_data(victim.weights_path.read_bytes())
    assert QuantizedCheckpoint.read(victim.folder).weights[Q0].bits == 3


@pytest.mark.usefixtures("nothing_mapped")
class TestFiles:
    def test_no_folder(self, victim: Any, tmp_path: Path) -> None:
        victim.refuse(errors.MissingFileError, r"no qdit\.json in .*nowhere", tmp_path / "nowhere")

    def test_a_file_instead_of_a_folder(self, victim: Any) -> None:
        victim.refuse(errors.MissingFileError, r"no qdit\.json in", victim.folder / "qdit.json")

    def test_no_manifest(self, victim: Any) -> None:
        victim.manifest_path.unlink()
        victim.refuse(errors.MissingFileError, r"no qdit\.json in .*run the export again")

    def test_no_tensors(self, victim: Any) -> None:
        victim.weights_path.unlink()
        victim.refuse(errors.MissingFileError, r"no weights\.safetensors in")

    @pytest.mark.parametrize("name", ["qdit.json", "weights.safetensors"])
    def test_a_folder_in_a_files_place(self, victim: Any, name: str) -> None:
        (victim.folder / name).unlink()
        (victim.folder / name).mkdir()
        victim.refuse(errors.MissingFileError, "must be a regular file")

    @pytest.mark.parametrize("name", ["qdit.json", "weights.safetensors"])
    def test_a_pipe_in_a_files_place_does_not_block(self, victim: Any, name: str) -> None:
        (victim.folder / name).unlink()
        os.mkfifo(victim.folder / name)
        victim.refuse(errors.MissingFileError, "must be a regular file")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_a_file_that_may_not_be_read(self, victim: Any) -> None:
        victim.manifest_path.chmod(0)
        victim.refuse(errors.MissingFileError, "cannot be read")

    def test_a_reading_error(self, victim: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(_path: Path) -> bytes:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(Path, "read_bytes", fail)
        victim.refuse(errors.MissingFileError, r"cannot be read: .*Input/output error")

    @pytest.mark.parametrize("name", ["qdit.json", "weights.safetensors"])
    def test_a_link_out_of_the_folder(self, victim: Any, name: str) -> None:
        (victim.folder / name).rename(victim.folder.parent / "outside")
        (victim.folder / name).symlink_to(Path("..") / "outside")
        victim.refuse(errors.UnsafePathError, r"is a link out of its folder; copy the file")

    def test_a_link_to_a_link_out_of_the_folder(self, victim: Any) -> None:
        victim.weights_path.rename(victim.folder.parent / "outside")
        (victim.folder / "step").symlink_to(victim.folder.parent / "outside")
        victim.weights_path.symlink_to("step")
        victim.refuse(errors.UnsafePathError, "is a link out of its folder")

    def test_a_link_to_nothing(self, victim: Any) -> None:
        victim.weights_path.unlink()
        victim.weights_path.symlink_to("nothing")
        victim.refuse(errors.MissingFileError, r"no weights\.safetensors in")

    def test_a_link_to_itself(self, victim: Any) -> None:
        victim.weights_path.unlink()
        victim.weights_path.symlink_to("weights.safetensors")
        with pytest.raises((errors.MissingFileError, errors.UnsafePathError)):
            victim.read()

    @pytest.mark.parametrize(
        "name",
        [
            "../weights.safetensors",
            "/etc/passwd",
            "sub/weights.safetensors",
            "..",
            ".",
            "",
            ".hidden",
            "..\\weights.safetensors",
            "C:weights.safetensors",
            "weights.safetensors\0.txt",
            "weights\n.safetensors",
            "weights.safetensors\n",
            "~",
            "w" * 300,
        ],
    )
    def test_a_path_for_a_name(self, victim: Any, name: str) -> None:
        (victim.folder.parent / "weights.safetensors").write_bytes(b"")
        manifest = victim.manifest
        manifest["weights"]["file"] = name
        victim.put_manifest(manifest)
        victim.refuse(errors.UnsafePathError, "must have a plain name")


def test_a_link_inside_the_folder_is_fine(victim: Any) -> None:
    victim.weights_path.rename(victim.folder / "tensors-1")
    victim.weights_path.symlink_to("tensors-1")
    assert victim.read().weights[Q0].bits == 3


def test_a_link_to_the_folder_itself_is_fine(victim: Any, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(victim.folder)
    assert QuantizedCheckpoint.read(tmp_path / "link").weights[Q0].bits == 3
