"""The targets `onnxruntime` and `onnxruntime-cuda`: the quantized model in the operators that ONNX
Runtime runs fastest on a CPU, and by its CUDA provider."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import onnx_ir as ir

from ...calibrate.checkpoint import QuantizedCheckpoint
from ...errors import InputError
from ...progress import Progress, Silent
from ..contents import LinearContents, checkpoint_contents
from ..lower import export_lowered
from ..opsets import DEFAULT_OPSET, ORT_DOMAIN, ComputeDtype, check_opset
from ..passes.lower_qdq import LowerQdqPass
from ..write import STANDARD_DOMAINS, ExportedModel
from .fuse_attention import FuseAttentionPass
from .fuse_modulation import FuseModulationPass
from .lower_cuda import LowerCudaPass
from .lower_onnxruntime import LowerOnnxRuntimePass
from .narrow_initializers import NarrowInitializersPass

DOMAINS = (*STANDARD_DOMAINS, ORT_DOMAIN)

# A CPU's file of more bytes has its weights beside it, where ONNX Runtime maps them: within it they
# would be in memory twice while a session loads, and twice more where the engine swaps nodes.
MAPPED_FROM = 64 << 20


def onnxruntime_lowering(contents: Mapping[str, LinearContents]) -> ir.passes.PassBase:
    """The target's passes, for a model traced in float32."""
    return ir.passes.Sequential(
        LowerOnnxRuntimePass(contents),
        FuseModulationPass(),
        FuseAttentionPass(),
        NarrowInitializersPass(),
    )


def cuda_lowering(contents: Mapping[str, LinearContents]) -> ir.passes.PassBase:
    """The passes of the target `onnxruntime-cuda`, for a model traced in float16."""
    return ir.passes.Sequential(LowerCudaPass(contents), FuseModulationPass(), FuseAttentionPass())


def full_precision_lowering(contents: Mapping[str, LinearContents]) -> ir.passes.PassBase:
    """An unquantized float16 model with what the target fuses around its linears."""
    return ir.passes.Sequential(
        LowerQdqPass(contents, "float16"), FuseModulationPass(), FuseAttentionPass()
    )


def check_onnxruntime_dtype(dtype: str) -> None:
    """Raise `InputError` for a compute dtype that the target does not have."""
    if dtype != "float32":
        raise InputError(
            f"target onnxruntime computes in float32, got --dtype {dtype}: its integer products "
            "give float32; leave --dtype out"
        )


def export_onnxruntime(
    checkpoint: QuantizedCheckpoint,
    path: Path,
    *,
    opset: int = DEFAULT_OPSET,
    progress: Progress | None = None,
) -> ExportedModel:
    """Write `checkpoint` as an ONNX file for ONNX Runtime on a CPU.

    Inputs, output, metadata and memory are those of `export_qdq`; metadata 'qdit.linears' also
    says what each linear became (`LowerOnnxRuntimePass`). Past `MAPPED_FROM` bytes the
    weights lie in `<name>.data` beside it. Raises `InputError` for an opset that cannot be written.
    """
    return _export(
        checkpoint, path, "float32", onnxruntime_lowering, opset, progress, inline_limit=MAPPED_FROM
    )


def export_onnxruntime_cuda(
    checkpoint: QuantizedCheckpoint,
    path: Path,
    *,
    opset: int = DEFAULT_OPSET,
    progress: Progress | None = None,
) -> ExportedModel:
    """Write `checkpoint` as a float16 ONNX file for ONNX Runtime's CUDA provider.

    As `export_onnxruntime` otherwise.
    """
    return _export(checkpoint, path, "float16", cuda_lowering, opset, progress)


def _export(
    checkpoint: QuantizedCheckpoint,
    path: Path,
    dtype: ComputeDtype,
    lower: Callable[[Mapping[str, LinearContents]], ir.passes.PassBase],
    opset: int,
    progress: Progress | None,
    inline_limit: int | None = None,
) -> ExportedModel:
    check_opset(opset)
    contents = checkpoint_contents(checkpoint)
    return export_lowered(
        checkpoint.skeleton(),
        checkpoint.family,
        contents,
        Path(path),
        name=checkpoint.model_name,
        dtype=dtype,
        opset=opset,
        progress=progress or Silent(),
        lowering=lower(contents),
        domains=DOMAINS,
        inline_limit=inline_limit,
    )
