"""A TensorRT engine under proof: its outputs, and its own file in ONNX Runtime beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...export.capabilities import TARGETS
from ...export.tensorrt.rules import check_file
from ...progress import Progress
from ..parity_internals import ExposedValues
from ..proof_engine import OnnxRuntimeProof, ProofEngine
from ..targets.options import BEST
from .chunks import ChunkedEngine
from .library import installed_features, installed_version
from .manifest import EngineManifest
from .settings import BuildSettings
from .store import FOLDER, StoredEngine, engine_path, manifest_path, stored_engine
from .target import plugins_of


class TensorRtProof:
    """A target's engine. The one on disk if it fits this machine, else it is built anew.

    TensorRT fuses its linears, so that none can be looked at; the whole engine is held against its
    own file in ONNX Runtime instead, and the precision ledger says what each linear runs in.
    """

    name = "tensorrt"
    dtype = "float16"
    on_gpu = True

    def __init__(self, onnx_path: Path, *, progress: Progress, threads: int | None = None) -> None:
        self.onnx_path = onnx_path
        self.target = onnx_path.stem
        self.exact = not TARGETS[self.target].changes
        self._threads = threads
        self.stored = _stored(onnx_path, self.target, progress)

    @property
    def what(self) -> str:
        return str(self.stored.path)

    def identity(self) -> dict[str, Any]:
        return {"engine": self.stored.manifest.engine_sha256}

    def exposed(self) -> ExposedValues:
        return ExposedValues({}, ())

    def references(self) -> Sequence[ProofEngine]:
        return [
            OnnxRuntimeProof(self.onnx_path, self.dtype, threads=self._threads, optimize=optimize)
            for optimize in (True, False)
        ]

    def open(self, extra_outputs: Sequence[str] = ()) -> ChunkedEngine:
        if extra_outputs:
            raise InputError(f"a TensorRT engine has no inner values, got {extra_outputs[0]!r}")
        return ChunkedEngine(self.stored.open())


def target_file(folder: Path, engine: str) -> Path:
    """The ONNX file of '--engine NAME' in an exported folder; 'tensorrt' is the only one there.

    Raises `InputError` where there is none, or more than one to choose from.
    """
    files = sorted((folder / FOLDER).glob("tensorrt-*.onnx"))
    names = [path.stem for path in files]
    if not files:
        raise InputError(
            f"{folder} holds no TensorRT file; export it with qdit-export --target tensorrt"
        )
    if engine != BEST:
        if engine not in names:
            raise InputError(f"{folder} holds {', '.join(names)}, got --engine {engine}")
        return files[names.index(engine)]
    if len(files) > 1:
        raise InputError(f"{folder} holds {', '.join(names)}; name one of them with --engine")
    return files[0]


def built_engine(onnx_path: Path, progress: Progress) -> StoredEngine:
    """See `TensorRtProof`."""
    return _stored(onnx_path, onnx_path.stem, progress)


def _stored(onnx_path: Path, target: str, progress: Progress) -> StoredEngine:
    """With the settings that its engine was built with before; the default ones where there is
    none."""
    _check_version(onnx_path, target)
    found = EngineManifest.read(manifest_path(engine_path(onnx_path)))
    settings = BuildSettings() if found is None else BuildSettings.from_json(found.settings)
    return stored_engine(
        onnx_path, settings, installed_features(), progress, plugins=plugins_of(target)
    )


def _check_version(onnx_path: Path, target: str) -> None:
    """Raise `InputError` for a file that was written for a TensorRT of other rules than this one's:
    a build would end in the parser's own words, after everything that comes before it."""
    version = installed_version()
    violations = check_file(onnx_path, str(version))
    if violations:
        others = f" and {len(violations) - 1} more" if len(violations) > 1 else ""
        raise InputError(
            f"{onnx_path} is no file for the installed TensorRT {version}: "
            f"{violations[0]}{others}; export it again here with --target {target}"
        )
