"""What an engine was built from and for: beside it, and last to be written.

An engine whose manifest is missing is no engine; one whose manifest says something else is built
anew.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...files import sha256_of_file, write_json
from .library import GpuIdentity
from .settings import BuildSettings
from .surroundings import Told

MANIFEST_VERSION = 1


@dataclass(frozen=True)
class EngineManifest:
    """The key of an engine (everything that it follows from), and its own hash and size.

    sources: SHA-256 of the ONNX file and its external data; plugins: of the kernels' code;
    preview_features: what the builder was asked for by these names (`build.py`). A manifest that
    has no such entry is of an engine that was built without any. told: what the layers of a weakly
    typed network were told (`surroundings.py`), for the lines of other tools; it follows from the
    key. Without the entry nothing was, or the engine is from before this was kept.
    """

    tensorrt: str
    gpu: dict[str, str]
    sources: dict[str, str]
    settings: dict[str, Any]
    plugins: str
    engine_sha256: str = ""
    engine_bytes: int = 0
    build_seconds: float = 0.0
    version: int = MANIFEST_VERSION
    preview_features: list[str] = field(default_factory=list)
    told: Told = field(default_factory=Told)

    @classmethod
    def of(
        cls,
        onnx_path: Path,
        settings: BuildSettings,
        tensorrt: str,
        gpu: GpuIdentity,
        plugins: str,
        preview_features: list[str],
    ) -> EngineManifest:
        """The manifest of an engine that is yet to be built."""
        data = onnx_path.with_name(f"{onnx_path.name}.data")
        files = [file for file in (onnx_path, data) if file.is_file()]
        return cls(
            tensorrt=tensorrt,
            gpu=gpu.to_json(),
            sources={file.name: sha256_of_file(file) for file in files},
            settings=json.loads(json.dumps(settings.to_json())),
            plugins=plugins,
            preview_features=preview_features,
        )

    def difference(self, wanted: EngineManifest) -> str:
        """What of `wanted`'s key this engine was not built with, in words; '' when nothing.

        An engine made for all GPUs or later versions runs there; its manifest still names the ones
        that it was built on, and these do not count then.
        """
        mine, other = self._key(), wanted._key()
        if self.settings.get("hardware_compatible"):
            mine["gpu"] = other["gpu"]
        if self.settings.get("version_compatible") and self._same_major(wanted):
            mine["tensorrt"] = other["tensorrt"]
        changed = [
            f"{name} {_short(mine[name])} → {_short(other[name])}"
            for name in other
            if mine[name] != other[name]
        ]
        return "; ".join(changed)

    def _key(self) -> dict[str, Any]:
        names = ("version", "tensorrt", "gpu", "sources", "settings", "plugins", "preview_features")
        value = asdict(self)
        return {name: value[name] for name in names}

    def _same_major(self, other: EngineManifest) -> bool:
        return self.tensorrt.split(".")[0] == other.tensorrt.split(".")[0]

    def write(self, path: Path) -> None:
        """Write atomically; `told` where layers were told anything."""
        value = asdict(self)
        if not self.told.precisions:
            del value["told"]
        write_json(path, value)

    @classmethod
    def read(cls, path: Path) -> EngineManifest | None:
        """The manifest at `path`; None for what is missing, damaged or of another version."""
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if "told" in value:
                value["told"] = Told(**value["told"])
            found = cls(**value)
        except (OSError, ValueError, TypeError, InputError):
            return None
        return found if found.version == MANIFEST_VERSION else None


def manifest_path(engine: Path) -> Path:
    """Where the manifest of an engine lies."""
    return engine.with_name(f"{engine.name}.json")


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} {_short(entry)}" for key, entry in value.items()) + "}"
    text = str(value)
    return text[:12] if len(text) == 64 else text
