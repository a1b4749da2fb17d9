"""Lower abstract linears to ONNX Runtime's operators: the `onnxruntime` target."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ..contents import LinearContents
from ..opsets import ORT_DOMAIN
from .linears import OnnxRuntimeLinears


class LowerOnnxRuntimePass(ir.passes.InPlacePass):
    """Replace every `qdit::GroupQuantLinear(layer)` by what `realize_onnxruntime` says of it.

    Requires: what `LowerQdqPass` does, in float32.
    Ensures: no node of domain 'qdit'; lazy initializers; opset com.microsoft 1; metadata
    'qdit.linears' as in `LowerQdqPass`, with each linear's 'form', the scheme that it 'computes'
    where that is not the plan's, and the 'reason'. Cases, by form:

    1. int8: activations as unsigned integers with a scale a token, shared by the linears that read
       one value; MatMulIntegerToFloat with int8 weights; times the token's scale; plus the bias.
    2. int8-split: the same for an input of three parts, whose products are added up.
    3. nbits: fake quantization in groups, shared likewise, then MatMulNBits at level 4, bias
       inside. The operator quantizes again what is already quantized, which changes nothing; on
       the input itself it would round ties otherwise than the simulation.
    4. nbits-split: MatMulNBits at level 4 on the three parts, which are added up.
    5. nbits-float: MatMulNBits at level 1, in float32.
    6. dequantized, qdq and float: as in `LowerQdqPass`.
    7. Kept: everything outside the linears.
    """

    def __init__(self, contents: Mapping[str, LinearContents]) -> None:
        super().__init__()
        self.contents = contents

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        model.graph.opset_imports[ORT_DOMAIN] = 1
        return OnnxRuntimeLinears(model, "float32").lower_all(self.contents)
