"""One TensorRT target of an export: its file, checked, its engine where one can be built."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...calibrate.checkpoint import QuantizedCheckpoint
from ...errors import StepError
from ...export.capabilities import TARGETS
from ...export.tensorrt.files import export_int4, export_int8, export_plugin
from ...export.tensorrt.rules import check_file
from ...export.tensorrt.versions import Features
from ...export.write import ExportedModel
from ...progress import Progress
from ..report.targets_schema import CommandEntry, EngineEntry, LedgerEntry, TargetEntry
from .commands import InputShape, polygraphy_command, trtexec_command
from .ledger import REQUESTED
from .library import installed_version, why_no_engine
from .linears import linears_of
from .plugin.packing import Packing
from .settings import BuildSettings
from .store import FOLDER, StoredEngine, engine_path, stored_engine
from .surroundings import Told

_MOST_VIOLATIONS = 3  # of the error message


@dataclass(frozen=True)
class TensorRtFiles:
    """What the TensorRT targets of one export share.

    output: the export's folder; scales: one a linear's input, for `tensorrt-int8` alone.
    """

    checkpoint: QuantizedCheckpoint
    output: Path
    features: Features
    settings: BuildSettings
    scales: Mapping[str, float]
    progress: Progress

    def path(self, target: str) -> Path:
        return self.output / FOLDER / f"{target}.onnx"

    def write(self, target: str) -> Path:
        """Write a target's ONNX file and hold it against TensorRT's rules.

        Raises `StepError` where the file breaks one: it is removed then.
        """
        path = self.path(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lower(target, path)
        version = str(self.features.version)
        broken = check_file(path, version)
        if broken:
            path.unlink()
            first = "; ".join(map(str, broken[:_MOST_VIOLATIONS]))
            raise StepError(
                f"{path.name} breaks {len(broken)} rules of TensorRT {version}: {first}; this is a "
                "fault of qdit's lowering, please report it"
            )
        self.progress.say(f"{path.name} keeps every rule of TensorRT {version}")
        return path

    def _lower(self, target: str, path: Path) -> ExportedModel:
        checkpoint, wanted, progress = self.checkpoint, self.features, self.progress
        if target == "tensorrt-int8":
            return export_int8(checkpoint, path, self.scales, wanted, progress=progress)
        if target == "tensorrt-int4":
            return export_int4(checkpoint, path, wanted, progress=progress)
        return export_plugin(checkpoint, path, Packing(), wanted, progress=progress)

    def build(self, target: str) -> StoredEngine:
        """The target's engine, built or reused. Raises `StepError` where it cannot be built."""
        return stored_engine(
            self.path(target),
            self.settings,
            self.features,
            self.progress,
            plugins=plugins_of(target),
        )


def plugins_of(target: str) -> Callable[[], str]:
    """What registers the plugins of a target's file and returns the digest of their code."""
    if target != "tensorrt-plugin":
        return str
    from .plugin.register import register_plugins  # the kernels' driver needs torch with CUDA

    return register_plugins


def no_engine_reason(features: Features) -> str:
    """Why no engine can be built here for files of this version; '' where one can."""
    why = why_no_engine()
    if why:
        return why
    installed, wanted = installed_version(), features.version
    if installed.major != wanted.major or installed < wanted:
        return (
            f"the files are for TensorRT {wanted}, and {installed} is installed; leave "
            "--tensorrt-version out to write them for that one"
        )
    return ""


def target_entry(
    files: TensorRtFiles,
    target: str,
    asked: str,
    built: StoredEngine | None,
    no_engine: str,
    numbers: Mapping[str, Any],
) -> TargetEntry:
    """The record of a finished target. numbers: how the file compares, see `file_check.py`."""
    path = files.path(target)
    linears = linears_of(path)
    requested = Counter(str(record.get(REQUESTED, "FP16")) for record in linears.values())
    data = path.with_name(f"{path.name}.data")
    size = sum(file.stat().st_size for file in (path, data) if file.is_file())
    return TargetEntry(
        name=target,
        asked=asked,
        checked_for=f"TensorRT {files.features.version}",
        file=path.relative_to(files.output).as_posix(),
        bytes=size,
        changes=TARGETS[target].changes,
        requested=dict(requested),
        engine=None if built is None else _engine_entry(built, files.output),
        no_engine=None if built is not None else no_engine,
        commands=_commands(files, target, built, quantized="INT8" in requested),
        **numbers,
    )


def _engine_entry(built: StoredEngine, output: Path) -> EngineEntry:
    manifest, ledger = built.manifest, built.ledger
    batch = manifest.settings["batch"]
    return EngineEntry(
        file=built.path.relative_to(output).as_posix(),
        bytes=manifest.engine_bytes,
        tensorrt=manifest.tensorrt,
        gpu=manifest.gpu["name"],
        driver=manifest.gpu["driver"],
        build_seconds=manifest.build_seconds,
        reused=built.reused,
        batch=(batch["least"], batch["best"], batch["most"]),
        ledger_summary=ledger.summary,
        fallbacks=len(ledger.fallbacks),
        unproved=len(ledger.unproved),
        ledger=tuple(LedgerEntry(**asdict(row)) for row in ledger.rows),
    )


def _commands(
    files: TensorRtFiles, target: str, built: StoredEngine | None, *, quantized: bool
) -> tuple[CommandEntry, ...]:
    """Both tools' lines. Neither knows qdit's plugins, so a plugin file has none."""
    if target == "tensorrt-plugin":
        return ()
    path = files.path(target)
    given = (path, engine_path(path), input_shapes(path), files.settings, files.features)
    told = Told() if built is None else built.manifest.told
    made = {
        "trtexec": trtexec_command(*given, quantized=quantized, told=told),
        "polygraphy": polygraphy_command(*given, quantized=quantized, told=told),
    }
    return tuple(
        CommandEntry(tool=tool, line=command.line, note=command.note)
        for tool, command in made.items()
    )


def input_shapes(path: Path) -> list[InputShape]:
    """A file's inputs, the batch left out."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    return [
        InputShape(value.name, tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim[1:]))
        for value in graph.input
    ]


def facts_json(path: Path) -> dict[str, Any]:
    """What a finished step left of a file's numbers; {} where it left none."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found
