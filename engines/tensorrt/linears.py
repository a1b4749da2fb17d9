"""What a written ONNX file says of its linears, and of its other matrix products."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...errors import ArtifactError
from .ledger import LINEARS_KEY, REQUESTED

_PRODUCTS = ("MatMul", "Gemm", "Conv")
# their products are not counted, so nothing is said of a file that has them
_OTHER_PRODUCTS = ("Attention", "ConvTranspose", "Einsum", "GRU", "LSTM", "MatMulInteger", "RNN")


def linears_of(onnx_path: Path) -> dict[str, dict[str, Any]]:
    """The 'qdit.linears' record of a file, {} for a file made elsewhere. Raises `ArtifactError`."""
    import onnx  # building needs no onnx package where no file is looked into

    try:
        model = onnx.load(onnx_path, load_external_data=False)
        entries = {entry.key: entry.value for entry in model.metadata_props}
        found = json.loads(entries.get(LINEARS_KEY, "{}"))
        return {str(name): dict(record) for name, record in found.items()}
    except Exception as error:  # protobuf raises kinds of its own
        raise ArtifactError(f"{onnx_path} is not a readable ONNX file: {error}") from error


def least_float_products(onnx_path: Path) -> int | None:
    """How many matrix products in floating point an engine of a file cannot do without.

    Those of constants with one and the same input may be merged into one, and count once; INT8
    linears do not count. None where the file has products of other kinds. Raises `ArtifactError`.
    """
    import onnx

    quantized = {
        name for name, record in linears_of(onnx_path).items() if record.get(REQUESTED) == "INT8"
    }
    graph = onnx.load(onnx_path, load_external_data=False).graph
    constant = {tensor.name for tensor in graph.initializer} | {""}  # '': an input left out
    groups: set[str] = set()  # by the input, or by the output where both factors are computed
    for node in graph.node:
        if all(name in constant for name in node.input):
            constant.update(node.output)
        elif node.op_type in _OTHER_PRODUCTS or node.domain not in ("", "ai.onnx"):
            return None
        elif node.op_type in _PRODUCTS and not _is_one_of(node, quantized):
            groups.add(node.input[0] if node.input[1] in constant else node.output[0])
    return len(groups)


def _is_one_of(node: Any, linears: set[str]) -> bool:
    """Whether a node is the product of a linear, by the names that the lowering gives."""
    return any(node.name in (name, f"{name}/product", f"{name}.output") for name in linears)
