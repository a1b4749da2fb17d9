"""Write the ONNX files of the TensorRT targets: checked, atomic, as every other exported file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from torch import nn

from ...calibrate.checkpoint import QuantizedCheckpoint
from ...calibrate.families.base import Family
from ...calibrate.model import DiffusionModel
from ...progress import Progress, Silent
from ..contents import LinearContents, checkpoint_contents, full_precision_contents
from ..full_precision import skeleton_of
from ..lower import FAMILY_KEY, lower_and_write
from ..opsets import DEFAULT_OPSET, ComputeDtype
from ..passes.lower_qdq import LowerQdqPass
from ..trace import trace
from ..write import ExportedModel
from .lower_int4 import LowerInt4Pass
from .lower_int8 import LowerInt8Pass
from .lower_plugin import LowerPluginPass
from .older_opset import NEWER, OlderOpsetPass
from .plugin_nodes import KernelPacking
from .versions import Features

TARGET_KEY = "qdit.target"

Contents = Mapping[str, LinearContents]  # by layer name


def compute_dtype(features: Features) -> ComputeDtype:
    """float16 where networks are strongly typed; before, flags choose it: files are float32."""
    return "float16" if features.strongly_typed else "float32"


def opset_for(features: Features) -> int:
    """The opset that files for a version are traced at, before `OlderOpsetPass`."""
    return DEFAULT_OPSET if features.newest_opset >= NEWER else NEWER


def export_int8(
    checkpoint: QuantizedCheckpoint,
    path: Path,
    scales: Mapping[str, float],
    features: Features,
    *,
    progress: Progress | None = None,
) -> ExportedModel:
    """The `tensorrt-int8` file: static scales by input name, see `LowerInt8Pass`."""

    def lower(contents: Contents, dtype: ComputeDtype) -> LowerInt8Pass:
        return LowerInt8Pass(contents, scales, dtype, features)

    return _export(_of_checkpoint(checkpoint), path, "tensorrt-int8", lower, features, progress)


def export_int4(
    checkpoint: QuantizedCheckpoint,
    path: Path,
    features: Features,
    *,
    progress: Progress | None = None,
) -> ExportedModel:
    """The `tensorrt-int4` file: weight-only, see `LowerInt4Pass`."""
    source = _of_checkpoint(checkpoint)
    return _export(source, path, "tensorrt-int4", LowerInt4Pass, features, progress)


def export_plugin(
    checkpoint: QuantizedCheckpoint,
    path: Path,
    packing: KernelPacking,
    features: Features,
    *,
    progress: Progress | None = None,
) -> ExportedModel:
    """The `tensorrt-plugin` file: plugin nodes that are functions too, see `LowerPluginPass`."""

    def lower(contents: Contents, dtype: ComputeDtype) -> LowerPluginPass:
        return LowerPluginPass(contents, packing, dtype)

    return _export(_of_checkpoint(checkpoint), path, "tensorrt-plugin", lower, features, progress)


def export_baseline(
    model: DiffusionModel, path: Path, features: Features, *, progress: Progress | None = None
) -> ExportedModel:
    """The unquantized model for the same TensorRT: what a quantized engine's speed is held to."""
    model.family.tie_shared_modules(model.denoiser)
    source = _Source(skeleton_of(model), model.family, model.name, full_precision_contents(model))
    return _export(source, path, "tensorrt-fp16", LowerQdqPass, features, progress)


@dataclass(frozen=True)
class _Source:
    """What a file is made of: the denoiser without its linears' weights, and those."""

    skeleton: nn.Module
    family: Family
    name: str
    contents: Contents


def _of_checkpoint(checkpoint: QuantizedCheckpoint) -> _Source:
    contents = checkpoint_contents(checkpoint)
    return _Source(checkpoint.skeleton(), checkpoint.family, checkpoint.model_name, contents)


def _export(
    source: _Source,
    path: Path,
    target: str,
    lower: Callable[[Contents, ComputeDtype], ir.passes.InPlacePass],
    features: Features,
    progress: Progress | None,
) -> ExportedModel:
    progress, dtype = progress or Silent(), compute_dtype(features)
    family, contents = source.family, source.contents
    lowering = lower(contents, dtype)  # first: it refuses what it cannot lower, tracing takes long
    progress.say(f"tracing the denoiser for {target}")
    linears = [entry.spec for entry in contents.values()]
    model = trace(source.skeleton, family, linears, dtype=dtype, opset=opset_for(features))
    return write_traced(
        model, family, source.name, contents, path, target, lowering, features, progress
    )


def write_traced(
    model: ir.Model,
    family: Family,
    name: str,
    contents: Contents,
    path: Path,
    target: str,
    lowering: ir.passes.InPlacePass,
    features: Features,
    progress: Progress,
) -> ExportedModel:
    """Lower and write an abstract model (changed in place), traced for `opset_for(features)`."""
    if model.graph.opset_imports[""] == NEWER:
        OlderOpsetPass()(model)
    model.metadata_props[FAMILY_KEY] = family.name
    model.metadata_props[TARGET_KEY] = target
    model.graph.name = name
    dtype = compute_dtype(features)
    return lower_and_write(model, contents, path, dtype=dtype, progress=progress, lowering=lowering)
