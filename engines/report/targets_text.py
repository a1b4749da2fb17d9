"""What the page says of each target, in words."""

from __future__ import annotations

from dataclasses import dataclass

from . import numbers
from .schema import Report
from .targets_schema import EngineEntry, TargetEntry


@dataclass(frozen=True)
class TargetView:
    """A target as the page shows it. name: with what it was asked for by, where that differs."""

    entry: TargetEntry
    name: str
    requested: str
    engine: str
    notes: str


def target_views(report: Report) -> list[TargetView]:
    """One view a target, in the export's order."""
    return [_view(entry) for entry in report.targets]


def _view(entry: TargetEntry) -> TargetView:
    name = entry.name if entry.asked == entry.name else f"{entry.name} (asked: {entry.asked})"
    requested = ", ".join(f"{count} {kind}" for kind, count in sorted(entry.requested.items()))
    engine = f"none: {entry.no_engine}" if entry.engine is None else _engine_text(entry.engine)
    return TargetView(entry, name, requested, engine, _notes(entry))


def _engine_text(engine: EngineEntry) -> str:
    least, best, most = engine.batch
    made = "reused" if engine.reused else f"built in {numbers.seconds(engine.build_seconds)}"
    return (
        f"{numbers.byte_size(engine.bytes)}, {made}, TensorRT {engine.tensorrt} on {engine.gpu} "
        f"(driver {engine.driver}), batch {least} … {most}, best {best}"
    )


def _notes(entry: TargetEntry) -> str:
    kept = (
        "passed its self-test in" if entry.name.startswith("onnxruntime") else "keeps every rule of"
    )
    by = f" ({entry.compared_by})" if entry.compared_by else ""
    notes = [f"{kept} {entry.checked_for}{by}"]
    if entry.changes:
        notes.append(entry.changes)
    if entry.engine is not None and entry.engine.fallbacks:
        notes.append(
            f"{entry.engine.fallbacks} quantized linears run in floating point (--allow-fallback)"
        )
    if entry.engine is not None and entry.engine.unproved:
        notes.append(
            f"what {entry.engine.unproved} quantized linears run in is not proved: TensorRT's "
            "inspector shows no layer of theirs"
        )
    return "; ".join(notes)
