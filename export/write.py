"""Write a lowered model: checked, atomic, in one file or with external data past 2 GB."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from ..errors import StepError
from ..progress import Progress
from .inline import write_inline
from .passes.spool_initializers import SpoolInitializersPass

# protobuf reads messages up to 2 GiB - 1; the graph's own bytes fit into the rest.
INLINE_LIMIT = 2**31 - 2**24
STANDARD_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class ExportedModel:
    """A written file. `data_path` is the external data beside it, None when all is in one file."""

    path: Path
    data_path: Path | None
    byte_size: int
    opset: int
    dtype: str


def write_model(
    model: ir.Model,
    path: Path,
    *,
    dtype: str,
    progress: Progress,
    inline_limit: int | None = None,
    domains: tuple[str, ...] = STANDARD_DOMAINS,
) -> ExportedModel:
    """Write `model` to `path`, with `<name>.data` beside it where it exceeds `inline_limit` bytes
    (`INLINE_LIMIT` by default).

    The files are made and checked (full check with shape inference) in a folder beside `path` and
    then moved into place, the data first: a kill at any point leaves no file of the new model, or
    a whole one. Identical initializers are stored once. Raises `StepError` where the checker
    refuses the model, or a node is neither of one of `domains` nor a function of the model itself.
    """
    _check_domains(model, domains)
    with _partial_folder(path) as folder:
        data = folder / f"{path.name}.data"
        spool = SpoolInitializersPass(data, progress)
        spool(model)
        proto = ir.to_proto(model)
        _keep_one_type_each(proto.graph)
        limit = INLINE_LIMIT if inline_limit is None else inline_limit
        external = spool.byte_size + proto.ByteSize() > limit
        made = folder / path.name
        if external:
            made.write_bytes(proto.SerializeToString(deterministic=True))
        else:
            write_inline(proto, data, made)
            data.unlink()
        _check(made)
        size = sum(file.stat().st_size for file in folder.iterdir())
        _install(folder, path, external)
    opset = model.graph.opset_imports[""]
    data_path = path.with_name(data.name) if external else None
    return ExportedModel(path, data_path, size, opset, dtype)


def _check_domains(model: ir.Model, domains: tuple[str, ...]) -> None:
    others = [domain for domain in domains if domain not in STANDARD_DOMAINS]
    held = ", ".join(["standard operators", *(f"those of {domain}" for domain in others)])
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain not in domains and node.op_identifier() not in model.functions:
            raise StepError(
                f"an exported file holds {held} and functions of its own only, got "
                f"{node.domain}::{node.op_type} in {node.name}; a lowering pass did not run"
            )


def _keep_one_type_each(graph: onnx.GraphProto) -> None:
    """No value_info for initializers, which say their type and shape themselves.

    `quantize_dynamic` of ONNX Runtime transposes a Gemm's weight and leaves the value_info as it
    was; onnx 1.23.1 then refuses the two shapes.
    """
    stored = {tensor.name for tensor in graph.initializer}
    kept = [value for value in graph.value_info if value.name not in stored]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def _check(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # the checker and shape inference raise kinds of their own
        raise StepError(f"the ONNX checker refuses the exported model: {error}") from error


@contextmanager
def _partial_folder(path: Path) -> Iterator[Path]:
    """A folder '.<name>.<pid>.partial' beside `path`, gone afterwards.

    Folders that killed processes left are removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f".{path.name}.*.partial"):
        if not _is_running(old.name.split(".")[-2]):
            shutil.rmtree(old, ignore_errors=True)
    folder = path.with_name(f".{path.name}.{os.getpid()}.partial")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def _install(folder: Path, path: Path, external: bool) -> None:
    """Move the files of `folder` into place: no order of events pairs old with new files."""
    for file in folder.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    data = path.with_name(f"{path.name}.data")
    if external or data.exists():
        path.unlink(missing_ok=True)  # before the data that it reads changes under it
        data.unlink(missing_ok=True)
    if external:
        (folder / data.name).replace(data)
    (folder / path.name).replace(path)


def external_files(model: onnx.ModelProto) -> set[str]:
    """The names of the files beside a model that hold its initializers."""
    return {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
