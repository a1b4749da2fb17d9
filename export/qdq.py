"""The `qdq` target: a quantized model in standard ONNX operators, the reference of all targets."""

from __future__ import annotations

from pathlib import Path

from ..calibrate.checkpoint import QuantizedCheckpoint
from ..progress import Progress, Silent
from .contents import checkpoint_contents
from .lower import export_lowered
from .opsets import DEFAULT_OPSET, ComputeDtype, check_dtype, check_opset
from .write import ExportedModel

__all__ = ["ExportedModel", "export_qdq"]


def export_qdq(
    checkpoint: QuantizedCheckpoint,
    path: Path,
    *,
    dtype: ComputeDtype = "float32",
    opset: int = DEFAULT_OPSET,
    progress: Progress | None = None,
) -> ExportedModel:
    """Write `checkpoint` as an ONNX file of standard operators.

    Inputs and output are named and shaped as the family says, float32 and int64 whatever `dtype`
    is, with a dynamic dimension 'batch'. Metadata 'qdit.linears' and 'qdit.blocks' name the values
    at every linear and after every block. Memory beyond the untouched parameters: one linear at a
    time. Raises `InputError` for an opset or dtype that cannot be written, before any work.
    """
    check_opset(opset)
    check_dtype(dtype)
    return export_lowered(
        checkpoint.skeleton(),
        checkpoint.family,
        checkpoint_contents(checkpoint),
        Path(path),
        name=checkpoint.model_name,
        dtype=dtype,
        opset=opset,
        progress=progress or Silent(),
    )
