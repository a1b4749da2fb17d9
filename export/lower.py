"""From a denoiser and its linears' contents to a written file in standard operators."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common
from torch import nn

from .. import __version__
from ..calibrate.families.base import Family
from ..progress import Progress
from .contents import LinearContents
from .opsets import ComputeDtype, ir_version
from .passes.lower_qdq import LowerQdqPass
from .passes.record_blocks import RecordBlocksPass
from .trace import trace
from .write import ExportedModel, write_model

FAMILY_KEY = "qdit.family"
DTYPE_KEY = "qdit.dtype"


def export_standard(
    denoiser: nn.Module,
    family: Family,
    contents: Mapping[str, LinearContents],
    path: Path,
    *,
    name: str,
    dtype: ComputeDtype,
    opset: int,
    progress: Progress,
) -> ExportedModel:
    """Trace `denoiser` (changed in place: pass a skeleton), lower it and write it to `path`."""
    progress.say("tracing the denoiser")
    linears = [entry.spec for entry in contents.values()]
    model = trace(denoiser, family, linears, dtype=dtype, opset=opset)
    model.metadata_props[FAMILY_KEY] = family.name
    model.graph.name = name
    return lower_and_write(model, contents, path, dtype=dtype, progress=progress)


def lower_and_write(
    model: ir.Model,
    contents: Mapping[str, LinearContents],
    path: Path,
    *,
    dtype: ComputeDtype,
    progress: Progress,
    lowering: ir.passes.InPlacePass | None = None,
) -> ExportedModel:
    """Lower an abstract model (changed in place) and write it to `path`.

    `lowering` is the target's pass, the one to standard operators (`LowerQdqPass`) by default.
    """
    ir.passes.Sequential(
        RecordBlocksPass(),
        lowering or LowerQdqPass(contents, dtype),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
    )(model)
    model.metadata_props[DTYPE_KEY] = dtype
    model.ir_version = ir_version(model.graph.opset_imports[""])
    model.producer_name, model.producer_version = "qdit", __version__
    exported = write_model(model, path, dtype=dtype, progress=progress)
    megabytes, opset = exported.byte_size / 1e6, exported.opset
    progress.say(f"wrote {path} ({megabytes:.1f} MB, opset {opset}, {dtype})")
    return exported
