"""One linear alone as an ONNX file: what the latency of a layer's scheme is measured with."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import onnx_ir as ir

from ..progress import Silent
from .contents import LinearContents
from .lower import lower_and_write
from .onnxruntime.files import DOMAINS, onnxruntime_lowering
from .opsets import DEFAULT_OPSET, LINEAR_OP, QDIT_DOMAIN, ComputeDtype, ir_version, onnx_dtype
from .write import ExportedModel

INPUT_NAME = "x"


def export_single_linear(
    contents: LinearContents,
    path: Path,
    *,
    rows: int,
    dtype: ComputeDtype = "float32",
    target: Literal["qdq", "onnxruntime"] = "qdq",
) -> ExportedModel:
    """Write y [rows, N] = linear(x [rows, K]) by the lowering and the writer of whole models.

    The input is called 'x'. Raises `StepError` where the ONNX checker refuses the file.
    """
    spec, compute = contents.spec, onnx_dtype(dtype)
    x = ir.Value(
        name=INPUT_NAME,
        type=ir.TensorType(compute),
        shape=ir.Shape([rows, spec.in_features]),
    )
    node = ir.node(
        LINEAR_OP, [x], {"layer": spec.name}, domain=QDIT_DOMAIN, name=spec.name, num_outputs=1
    )
    output = node.outputs[0]
    output.name, output.dtype = "y", compute
    output.shape = ir.Shape([rows, spec.out_features])
    opsets = {"": DEFAULT_OPSET, QDIT_DOMAIN: 1}
    graph = ir.Graph([x], [output], nodes=[node], opset_imports=opsets, name=spec.name)
    model = ir.Model(graph, ir_version=ir_version(DEFAULT_OPSET))
    named = {spec.name: contents}
    if target == "qdq":
        return lower_and_write(model, named, path, dtype=dtype, progress=Silent())
    lowering = onnxruntime_lowering(named)
    return lower_and_write(
        model, named, path, dtype=dtype, progress=Silent(), lowering=lowering, domains=DOMAINS
    )
