"""From a denoiser and its linears' contents to a written file of one target."""

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
from .write import STANDARD_DOMAINS, ExportedModel, write_model

FAMILY_KEY = "qdit.family"
DTYPE_KEY = "qdit.dtype"


def export_lowered(
    denoiser: nn.Module,
    family: Family,
    contents: Mapping[str, LinearContents],
    path: Path,
    *,
    name: str,
    dtype: ComputeDtype,
    opset: int,
    progress: Progress,
    lowering: ir.passes.PassBase | None = None,
    domains: tuple[str, ...] = STANDARD_DOMAINS,
    inline_limit: int | None = None,
) -> ExportedModel:
    """Trace `denoiser` (changed in place: pass a skeleton), lower it and write it to `path`.

    `lowering`, `domains` and `inline_limit` as in `lower_and_write`.
    """
    progress.say("tracing the denoiser")
    linears = [entry.spec for entry in contents.values()]
    model = trace(denoiser, family, linears, dtype=dtype, opset=opset)
    model.metadata_props[FAMILY_KEY] = family.name
    model.graph.name = name
    return lower_and_write(
        model,
        contents,
        path,
        dtype=dtype,
        progress=progress,
        lowering=lowering,
        domains=domains,
        inline_limit=inline_limit,
    )


def lower_and_write(
    model: ir.Model,
    contents: Mapping[str, LinearContents],
    path: Path,
    *,
    dtype: ComputeDtype,
    progress: Progress,
    lowering: ir.passes.PassBase | None = None,
    domains: tuple[str, ...] = STANDARD_DOMAINS,
    inline_limit: int | None = None,
) -> ExportedModel:
    """Lower an abstract model (changed in place) and write it to `path`.

    `lowering` is the target's pass, the one to standard operators (`LowerQdqPass`) by default;
    `domains` are those of the operators that its file may hold, beside functions of its own;
    `inline_limit` as in `write_model`.
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
    exported = write_model(
        model, path, dtype=dtype, progress=progress, inline_limit=inline_limit, domains=domains
    )
    megabytes, opset = exported.byte_size / 1e6, exported.opset
    progress.say(f"wrote {path} ({megabytes:.1f} MB, opset {opset}, {dtype})")
    return exported
