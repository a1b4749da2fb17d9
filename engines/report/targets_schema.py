"""The part of report.json on targets, and the file that keeps it for `qdit-validate`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, TypeAdapter, ValidationError

from ...errors import ArtifactError
from ...files import write_json
from ..probe_check import SUFFIX as PROBE_SUFFIX
from .entry import Entry, first_problem

TARGETS_NAME = "targets.json"


class LedgerEntry(Entry):
    """One linear: the precision that the file asks for, what runs, and in which layer."""

    linear: str
    requested: str
    executed: str
    layer: str


class EngineEntry(Entry):
    """A built engine. `batch`: least, best and most samples of a call."""

    file: str
    bytes: int = Field(ge=0)
    tensorrt: str
    gpu: str
    driver: str
    build_seconds: float = Field(ge=0)
    reused: bool
    batch: tuple[int, int, int]
    ledger_summary: str
    fallbacks: int = Field(ge=0)
    unproved: int = Field(default=0, ge=0)  # reports of before have none
    ledger: tuple[LedgerEntry, ...]


class CommandEntry(Entry):
    """A command line of another tool that builds the same engine.

    `note`: in what it would be another engine, '' for nothing.
    """

    tool: str
    line: str
    note: str = ""  # reports of before have none


class TargetEntry(Entry):
    """One target's file and engine.

    `asked`: the name of the list that it came from; `checked_for`: the runtime whose rules the file
    was checked against; `changes`: what it does otherwise than the plan, '' for nothing;
    `requested`: linears by the precision that the file asks for; `file_vs_simulation`: relative
    error of the predicted noise, the file in ONNX Runtime against the simulation, null where it was
    not measured; `compared_by`: whose products made it, '' for ONNX Runtime's own where there is no
    choice; `no_engine`: why none was built, null where one was.
    """

    name: str
    asked: str
    checked_for: str
    file: str
    bytes: int = Field(ge=0)
    changes: str
    requested: dict[str, int]
    file_vs_simulation: float | None = None
    compared_inputs: int = Field(default=0, ge=0)
    compared_by: str = ""  # records of before have none
    engine: EngineEntry | None = None
    no_engine: str | None = None
    commands: tuple[CommandEntry, ...] = ()


def files_of(target: TargetEntry) -> list[str]:
    """A target's files by their paths in the output folder; external data may be absent."""
    engine = [] if target.engine is None else [target.engine.file]
    probe = Path(target.file).with_suffix(PROBE_SUFFIX).as_posix()
    return [target.file, f"{target.file}.data", probe, *engine]


_ALL = TypeAdapter(tuple[TargetEntry, ...])


def write_targets_file(targets: tuple[TargetEntry, ...], path: Path) -> None:
    """Write canonical JSON, atomically; without targets there is no file."""
    if targets:
        write_json(path, [entry.model_dump(mode="json") for entry in targets])
    else:
        path.unlink(missing_ok=True)


def read_targets(path: Path) -> tuple[TargetEntry, ...]:
    """Read a targets.json; () where there is none. Raises `ArtifactError` when malformed."""
    try:
        return _ALL.validate_json(path.read_bytes())
    except FileNotFoundError:
        return ()
    except ValidationError as error:
        raise ArtifactError(
            f"{path} is not the record of an export's targets: {first_problem(error)}; export again"
        ) from error
