"""What the `onnxruntime-cuda` target makes of each scheme: ONNX Runtime's CUDA provider.

That provider multiplies 16-bit activations by integer weights (`MatMulNBits`), and has no product
of activations that are quantized as they come: no `MatMulIntegerToFloat`, no 8-bit blocked
QuantizeLinear (version 1.31 stops at it), and a `MatMulInteger` whose quantizing, int32 sums and
scaling cost more passes over memory than its int8 product saves (docs/adr/0011). So weights are the
plan's, and activations stay in float16: finer than any plan, never coarser.
"""

from __future__ import annotations

from ...calibrate.plan import LinearSpec
from ...calibrate.schemes import LayerScheme
from ..realization import Form, Realization

# The blocks of MatMulNBits that its faster kernels on a GPU take too; any other falls off them.
CUDA_BLOCKS = (32, 64, 128)

_FINER = "the CUDA provider has no product of quantized activations: they stay float16"


def realize_onnxruntime_cuda(spec: LinearSpec, scheme: LayerScheme) -> Realization:
    """The linear in the CUDA provider's operators, in a float16 graph.

    1. 'float': weights of 16 bits.
    2. 'nbits-float16': weights in groups that a block of 32, 64 or 128 divides: MatMulNBits with
       float16 activations; scales and zero points of coarser groups are repeated.
    3. 'dequantized': other weights become float16 at load.
    4. Quantized activations, in 2 and 3: left unquantized, so that the scheme is weight-only.
    """
    if not scheme.quantizes_weights:
        return Realization("float", scheme)
    form: Form = "dequantized" if cuda_block(spec, scheme) is None else "nbits-float16"
    if not scheme.quantizes_activations:
        return Realization(form, scheme)
    return Realization(form, scheme.weight_only(), _FINER)


def cuda_block(spec: LinearSpec, scheme: LayerScheme) -> int | None:
    """The largest block that divides the weight group; None where there is none."""
    size = scheme.weight_group_size(spec.in_features)
    return max((block for block in CUDA_BLOCKS if size % block == 0), default=None)


def refuse_onnxruntime_cuda(spec: LinearSpec, scheme: LayerScheme) -> str | None:
    """Why the file does not compute the scheme as it is, or None."""
    made = realize_onnxruntime_cuda(spec, scheme)
    return None if made.is_exact(scheme) else made.reason


def nearest_onnxruntime_cuda(spec: LinearSpec, scheme: LayerScheme) -> LayerScheme:
    """The scheme that the file computes: the same weights, activations unquantized."""
    return realize_onnxruntime_cuda(spec, scheme).scheme
