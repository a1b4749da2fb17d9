"""A sound checkpoint folder to be spoiled in one way or another."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from torch import Tensor

from qdit.calibrate import checkpoint_read
from qdit.calibrate.checkpoint import QuantizedCheckpoint
from qdit.calibrate.schemes import LayerScheme
from qdit.errors import ArtifactError

Json = dict[str, Any]

# One layer whose packed rows and zero points end inside a byte: 36 values of 3 bits.
ODD_LAYER = {"transformer_blocks.0.attn1.to_q": LayerScheme(3, 8, "channel", "token", False, False)}


class Victim:
    """A copy of a sound checkpoint, with what an attacker needs to change it consistently."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest_path = folder / "qdit.json"
        self.weights_path = folder / "weights.safetensors"

    @property
    def manifest(self) -> Json:
        """The manifest as JSON, read anew."""
        value: Json = json.loads(self.manifest_path.read_text("utf-8"))
        return value

    def put_manifest(self, manifest: object) -> None:
        self.manifest_path.write_text(json.dumps(manifest), "utf-8")

    def put_data(self, data: bytes) -> None:
        """Replace the tensor file and let the manifest vouch for it: an attacker can do both."""
        self.weights_path.write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        manifest = self.manifest
        manifest["weights"] |= {"bytes": len(data), "sha256": digest}
        self.put_manifest(manifest)

    def change_config(self, changes: Json, key: str = "config") -> None:
        manifest = self.manifest
        manifest["model"][key] |= changes
        self.put_manifest(manifest)

    def change_tensors(self, change: Callable[[dict[str, Tensor]], object]) -> None:
        tensors = safetensors.torch.load_file(self.weights_path)
        change(tensors)
        self.put_data(safetensors.torch.save(tensors))

    def change_header(self, change: Callable[[Json], object]) -> None:
        """Rewrite the tensor file's header; the data stays."""
        data = self.weights_path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        changed = change(header)
        text = json.dumps(header if changed is None else changed).encode()
        self.put_data(struct.pack("<Q", len(text)) + text + data[end:])

    def read(self) -> QuantizedCheckpoint:
        return QuantizedCheckpoint.read(self.folder)

    def refuse(self, error: type[ArtifactError], match: str, folder: Path | None = None) -> None:
        """Reading must fail with exactly this error, in one line."""
        with pytest.raises(error, match=match) as caught:
            QuantizedCheckpoint.read(folder or self.folder)
        assert type(caught.value) is error  # the name itself, no relative of it
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 2

    def survive(self) -> None:
        """Reading works, and what was read can be built, or fails by a name in one line."""
        try:
            self.read().skeleton()
        except ArtifactError as error:
            assert "\n" not in str(error)


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory, make_quantized: Callable[..., Any]) -> Path:
    """The folder of a sound checkpoint."""
    folder = tmp_path_factory.mktemp("sound")
    scheme = LayerScheme(4, 8, "channel", "token")
    make_quantized(scheme, ODD_LAYER, attention_head_dim=18).checkpoint.write(folder)
    return folder


@pytest.fixture
def victim(sound: Path, tmp_path: Path) -> Victim:
    return Victim(Path(shutil.copytree(sound, tmp_path / "checkpoint")))


@pytest.fixture
def nothing_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """No case that uses this may get as far as hashing or mapping the tensors."""
    monkeypatch.setattr(checkpoint_read, "TensorFile", None)
    monkeypatch.setattr(checkpoint_read, "sha256_of_file", None)
