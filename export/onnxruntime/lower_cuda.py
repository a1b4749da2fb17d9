"""Lower abstract linears to the CUDA provider's operators: the `onnxruntime-cuda` target."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ..contents import LinearContents
from ..opsets import ORT_DOMAIN
from ..passes.lower_qdq import LinearLowering
from ..realization import Realization
from .cuda_rules import cuda_block, realize_onnxruntime_cuda
from .cuda_weight import emit_cuda_weight
from .facts import realization_facts

_FLOAT16 = ir.DataType.FLOAT16


class LowerCudaPass(ir.passes.InPlacePass):
    """Replace every `qdit::GroupQuantLinear(layer)` by what `realize_onnxruntime_cuda` says of it.

    Requires: what `LowerQdqPass` does, in float16.
    Ensures: no node of domain 'qdit'; lazy initializers; opset com.microsoft 1; metadata
    'qdit.linears' as `LowerOnnxRuntimePass` writes it. Cases, by form:

    1. nbits-float16: MatMulNBits of the float16 input, then Add of the bias: the operator adds a
       bias of its own in a pass over memory too, and has fewer kernels with one.
    2. dequantized and float: as in `LowerQdqPass`, the activations unquantized.
    3. Kept: everything outside the linears.
    """

    def __init__(self, contents: Mapping[str, LinearContents]) -> None:
        super().__init__()
        self.contents = contents

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        model.graph.opset_imports[ORT_DOMAIN] = 1
        return CudaLinears(model, "float16").lower_all(self.contents)


class CudaLinears(LinearLowering):
    """y = x Ŵ + b in float16, by the realization of each linear."""

    def activation(self, x: ir.Value, contents: LinearContents) -> ir.Value:
        return x  # quantized or not in the plan

    def product(self, x: ir.Value, contents: LinearContents, shape: ir.Shape) -> ir.Value:
        if self._realization(contents).form != "nbits-float16":
            return super().product(x, contents, shape)
        block = cuda_block(contents.spec, contents.scheme)
        if block is None:
            raise ValueError(f"{contents.spec.name} has no block of MatMulNBits")
        weight, attributes = emit_cuda_weight(self.emit, contents, block)
        name = self.product_name(contents)
        made = self.emit.contrib("MatMulNBits", [x, *weight], name, _FLOAT16, shape, **attributes)
        return self.add_bias(made, contents, shape)

    def lower(self, node: ir.Node, contents: LinearContents) -> None:
        super().lower(node, contents)
        self.records[contents.spec.name] |= realization_facts(
            self._realization(contents), contents.scheme
        )

    def _realization(self, contents: LinearContents) -> Realization:
        return realize_onnxruntime_cuda(contents.spec, contents.scheme)
