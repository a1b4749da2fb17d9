"""`qdit-inspect`: what is in an exported folder or an ONNX file, linear by linear."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..calibrate.checkpoint import QuantizedCheckpoint
from ..calibrate.plan import LinearSpec, QuantizationPlan
from ..calibrate.schemes import UNQUANTIZED_BITS, LayerScheme
from ..errors import ArtifactError, InputError
from ..export.capabilities import TARGETS, check
from ..export.opsets import LINEARS_KEY
from ..export.tensorrt.rules import Violation, check_file
from ..export.write import external_files
from ..files import canonical_json
from .tensorrt.ledger import Ledger
from .tensorrt.manifest import EngineManifest
from .tensorrt.store import FOLDER, checked_engine, ledger_path, manifest_path

_MEGA = 1e6


@dataclass(frozen=True)
class LinearRow:
    """One linear: weight [N, K] = [out_features, in_features]."""

    name: str
    in_features: int
    out_features: int
    scheme: LayerScheme

    @property
    def byte_size(self) -> int:
        """Bytes of integers, scales, multipliers and zero points, without the bias."""
        bits = self.scheme.effective_weight_bits(self.in_features)
        return round(bits * self.in_features * self.out_features / 8)


@dataclass(frozen=True)
class TargetRow:
    """Whether a target can run the plan, and the first reason where it cannot."""

    target: str
    runs: bool
    reason: str


@dataclass(frozen=True)
class EngineRow:
    """A built engine's file and its precision ledger."""

    engine: str
    ledger: Ledger


@dataclass(frozen=True)
class Inspection:
    """What `qdit-inspect` found."""

    artifact: str
    model: str
    facts: dict[str, str]
    linears: tuple[LinearRow, ...]
    targets: tuple[TargetRow, ...]
    file_bytes: dict[str, int]
    engines: tuple[EngineRow, ...] = ()

    @property
    def effective_weight_bits(self) -> float:
        weights = sum(row.in_features * row.out_features for row in self.linears)
        return 8 * sum(row.byte_size for row in self.linears) / weights if weights else 0.0


def inspect_artifact(path: Path) -> Inspection:
    """Inspect an exported folder, one .onnx file or one TensorRT .engine."""
    if path.is_dir():
        return _inspect_folder(path)
    if path.suffix == ".engine":
        return inspect_engine(path)
    if path.suffix == ".onnx" and path.is_file():
        return _inspect_onnx(path)
    raise InputError(
        f"expected an exported folder, an .onnx file or an .engine, got {path}; check the path"
    )


def inspect_engine(path: Path) -> Inspection:
    """A built engine: what it follows from, and its precision ledger. It is not loaded."""
    manifest, row = checked_engine(path), _engine_row(path)
    facts = {
        "TensorRT": manifest.tensorrt,
        "GPU": ", ".join(f"{key} {value}" for key, value in manifest.gpu.items()),
        "settings": ", ".join(f"{key} {value}" for key, value in manifest.settings.items()),
        "built in": f"{manifest.build_seconds:.1f} s",
        **{f"from {name}": digest for name, digest in manifest.sources.items()},
    }
    return Inspection(
        str(path), path.stem, facts, (), (), {path.name: manifest.engine_bytes}, (row,)
    )


def _engine_row(path: Path) -> EngineRow:
    return EngineRow(path.name, Ledger.read(ledger_path(path)))


def broken_rules(path: Path, version: str) -> list[Violation]:
    """What keeps an .onnx file from being built by a TensorRT version; empty where nothing does."""
    return check_file(path, version)


def rules_as_json(broken: list[Violation]) -> str:
    """Violations as canonical JSON, without the final newline."""
    return canonical_json([asdict(violation) for violation in broken]).rstrip("\n")


def _inspect_folder(folder: Path) -> Inspection:
    checkpoint = QuantizedCheckpoint.read(folder)
    linears = checkpoint.linears
    rows = tuple(
        LinearRow(s.name, s.in_features, s.out_features, checkpoint.plan[s.name]) for s in linears
    )
    files = {
        str(file.relative_to(folder)): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.relative_to(folder).parts[0].startswith(".")
    }
    facts = {
        "family": checkpoint.family.name,
        "bits": checkpoint.plan.bits,
        "full precision (float16)": f"{checkpoint.full_precision_fp16_bytes / _MEGA:.1f} MB",
        "quantized checkpoint": f"{checkpoint.byte_size / _MEGA:.1f} MB",
    }
    model = checkpoint.model_name
    engines = tuple(
        _engine_row(engine)
        for engine in sorted((folder / FOLDER).glob("*.engine"))
        if EngineManifest.read(manifest_path(engine)) is not None
    )
    targets = _targets(checkpoint.plan, linears)
    return Inspection(str(folder), model, facts, rows, targets, files, engines)


def _inspect_onnx(path: Path) -> Inspection:
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf raises its own kinds for damaged bytes
        raise ArtifactError(f"{path} is not a readable ONNX file: {error}") from error
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    rows = _rows_of(metadata, path)
    counts: dict[str, int] = {}
    for node in model.graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    common = sorted(counts.items(), key=lambda item: -item[1])[:12]
    facts = {
        "opset": ", ".join(f"{domain} {version}" for domain, version in opsets.items()),
        "inputs": ", ".join(_value_text(value) for value in model.graph.input),
        "outputs": ", ".join(_value_text(value) for value in model.graph.output),
        "nodes": ", ".join(f"{count} {kind}" for kind, count in common),
    }
    files = {path.name: path.stat().st_size}
    for data in sorted(external_files(model)):
        external = path.parent / data
        files[data] = external.stat().st_size if external.is_file() else 0
    return Inspection(str(path), model.graph.name, facts, rows, (), files)


def _rows_of(metadata: dict[str, str], path: Path) -> tuple[LinearRow, ...]:
    """The linears that the export recorded in the file; none for a file made elsewhere."""
    if LINEARS_KEY not in metadata:
        return ()
    try:
        linears = json.loads(metadata[LINEARS_KEY])
        return tuple(
            LinearRow(
                name,
                entry["in_features"],
                entry["out_features"],
                LayerScheme.from_json(entry["scheme"]),
            )
            for name, entry in linears.items()
        )
    except (ValueError, KeyError, TypeError, AttributeError, InputError) as error:
        raise ArtifactError(f"{path} has a damaged qdit.linears record: {error}") from error


def _value_text(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    shape = ", ".join(dim.dim_param or str(dim.dim_value) for dim in tensor.shape.dim)
    kind = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    return f"{value.name} {kind}[{shape}]"


def _targets(plan: QuantizationPlan, linears: list[LinearSpec]) -> tuple[TargetRow, ...]:
    rows = []
    for name, target in TARGETS.items():
        refusals = check(plan, linears, name)
        reason = target.changes if target.built else "not written by this version of qdit yet"
        if refusals:
            more = f" (and {len(refusals) - 1} more)" if len(refusals) > 1 else ""
            reason = f"{refusals[0].layer}: {refusals[0].reason}{more}"
            if target.realize is not None:  # it runs all the same, but not as planned
                reason = f"not as planned: {reason}"
        rows.append(TargetRow(name, not refusals or target.realize is not None, reason))
    return tuple(rows)


def as_json(found: Inspection) -> str:
    """The inspection as canonical JSON."""
    linears = [
        {
            "name": row.name,
            "in_features": row.in_features,
            "out_features": row.out_features,
            "bytes": row.byte_size,
            "scale_format": row.scheme.scale_format,
            **row.scheme.to_json(),
        }
        for row in found.linears
    ]
    value: dict[str, Any] = {
        "artifact": found.artifact,
        "model": found.model,
        "facts": found.facts,
        "effective_weight_bits": found.effective_weight_bits,
        "linears": linears,
        "targets": [asdict(row) for row in found.targets],
        "file_bytes": found.file_bytes,
        "engines": [
            {"engine": row.engine, "ledger": [asdict(entry) for entry in row.ledger.rows]}
            for row in found.engines
        ],
    }
    return canonical_json(value)


def print_tables(found: Inspection, console: Console) -> None:
    """The inspection as tables on a terminal."""
    console.print(f"[bold]{found.model}[/]  {found.artifact}")
    for name, fact in found.facts.items():
        console.print(f"  {name}: {fact}", highlight=False)
    if found.linears:
        console.print(_linears_table(found))
    if found.targets:
        console.print(_targets_table(found.targets))
    for row in found.engines:
        console.print(_ledger_table(row))
    console.print(_files_table(found.file_bytes))


def _ledger_table(row: EngineRow) -> Table:
    """Every linear of an engine; what fell back in red, what nothing proves in yellow."""
    table = Table(title=f"Precision of {row.engine}: {row.ledger.summary}")
    table.add_column("linear", no_wrap=True)
    table.add_column("asked for")
    table.add_column("runs in")
    table.add_column("layer", overflow="fold")
    for entry in row.ledger.rows:
        color = "red" if entry.fell_back else "yellow" if entry.is_open else "default"
        executed = f"[{color}]{entry.executed}[/]"
        table.add_row(entry.linear, entry.requested, executed, escape(entry.layer))
    return table


def _linears_table(found: Inspection) -> Table:
    table = Table(title="Linears", show_footer=True)
    total = sum(row.byte_size for row in found.linears)
    table.add_column("linear", footer=f"{len(found.linears)} linears", no_wrap=True)
    table.add_column("K", justify="right")
    table.add_column("N", justify="right")
    table.add_column("weights")
    table.add_column("activations")
    table.add_column("bits", footer=f"{found.effective_weight_bits:.3f}", justify="right")
    table.add_column("bytes", footer=f"{total:,}", justify="right")
    for row in found.linears:
        weights, _, activations = row.scheme.label.partition(" · ")
        table.add_row(
            row.name,
            str(row.in_features),
            str(row.out_features),
            weights,
            "–" if row.scheme.activation_bits == UNQUANTIZED_BITS else activations,
            f"{row.scheme.effective_weight_bits(row.in_features):.3f}",
            f"{row.byte_size:,}",
        )
    return table


def _targets_table(targets: tuple[TargetRow, ...]) -> Table:
    table = Table(title="What each target can run")
    table.add_column("target", no_wrap=True)
    table.add_column("runs")
    table.add_column("reason")
    for row in targets:
        table.add_row(row.target, "[green]yes[/]" if row.runs else "[red]no[/]", row.reason)
    return table


def _files_table(file_bytes: dict[str, int]) -> Table:
    table = Table(title="Files")
    table.add_column("file")
    table.add_column("bytes", justify="right")
    for name, size in file_bytes.items():
        table.add_row(name, f"{size:,}")
    return table
