"""The full-precision model as ONNX: the baseline that quantized files are measured against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import onnx_ir as ir
from torch import nn

from ..calibrate.checkpoint_model import empty_denoiser, find_ties, load_parameters, stored_tensors
from ..calibrate.model import DiffusionModel
from ..calibrate.simulate import output_dtype
from ..progress import Progress, Silent
from .contents import LinearContents, full_precision_contents
from .lower import export_lowered
from .opsets import DEFAULT_OPSET, ORT_DOMAIN, ComputeDtype, check_dtype, check_opset
from .write import STANDARD_DOMAINS, ExportedModel

Lowering = Callable[[Mapping[str, LinearContents]], ir.passes.PassBase]


def export_full_precision(
    model: DiffusionModel,
    path: Path,
    *,
    dtype: ComputeDtype = "float32",
    opset: int = DEFAULT_OPSET,
    progress: Progress | None = None,
    lowering: Lowering | None = None,
) -> ExportedModel:
    """Write `model` unquantized, by the same trace and names as `export_qdq`.

    `model` is not changed but for equal modules that are tied. The weights are read from it one at
    a time; past 2 GB they go to `<name>.data`. `lowering` makes the passes in place of those to
    standard operators; the file may then hold ONNX Runtime's too. Raises `InputError` for an opset
    or dtype that cannot be written.
    """
    check_opset(opset)
    check_dtype(dtype)
    model.family.tie_shared_modules(model.denoiser)
    contents = full_precision_contents(model)
    return export_lowered(
        skeleton_of(model),
        model.family,
        contents,
        Path(path),
        name=model.name,
        dtype=dtype,
        opset=opset,
        progress=progress or Silent(),
        lowering=None if lowering is None else lowering(contents),
        domains=STANDARD_DOMAINS if lowering is None else (*STANDARD_DOMAINS, ORT_DOMAIN),
    )


def skeleton_of(model: DiffusionModel) -> nn.Module:
    """A second denoiser that shares all parameters but those of the linears, which stay meta."""
    denoiser = empty_denoiser(model.family, model.config, find_ties(model.denoiser))
    linears = tuple(f"{spec.name}." for spec in model.linears)
    tensors = stored_tensors(model.denoiser)
    outside = {name: value for name, value in tensors.items() if not name.startswith(linears)}
    load_parameters(denoiser, outside, "cpu", output_dtype(model.denoiser))
    return denoiser
