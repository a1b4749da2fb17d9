"""Per-token activations as unsigned integers: what an int8 product on a CPU takes."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from ..emit import Emitter
from .rows import INT64, OFFSET, UINT8, channels, dims, emit_scale


class TokenRows:
    """Quantizes values [..., T, K] once each, and shares the zero points of equal shapes."""

    def __init__(self, emit: Emitter) -> None:
        self._emit = emit
        self._quantized: dict[tuple[int, int], tuple[ir.Value, ir.Value]] = {}
        self._offsets: dict[str, ir.Value] = {}

    def quantize(self, x: ir.Value, bits: int) -> tuple[ir.Value, ir.Value]:
        """(q + 128 as UINT8 [..., K], s [..., 1]) of x [..., K] float32, symmetric, `bits` bits.

        q and s equal the simulation's to the bit. Unsigned, because products with signed
        activations are 5 to 20 times slower on x86 (docs/targets.md).
        """
        key = (id(x), bits)
        if key not in self._quantized:
            prefix = f"{x.name}/a{bits}_token"
            scale = emit_scale(self._emit, x, bits, prefix)
            integers = self._emit.node(
                "QuantizeLinear",
                [x, scale, self._offset(scale)],
                f"{prefix}/quantized",
                UINT8,
                dims(x),
                axis=-1,
                block_size=channels(x),
            )
            self._quantized[key] = integers, scale
        return self._quantized[key]

    def _offset(self, scale: ir.Value) -> ir.Value:
        """128 in the shape of `scale`, made once for values of one shape."""
        key = str(scale.shape)
        if key not in self._offsets:
            emit, name = self._emit, f"{scale.name}_offset"
            rank = len(dims(scale))
            shape = emit.node("Shape", [scale], f"{name}/shape", INT64, [rank])
            value = onnx.helper.make_tensor("value", onnx.TensorProto.UINT8, [1], [OFFSET])
            self._offsets[key] = emit.node(
                "ConstantOfShape",
                [shape],
                name,
                UINT8,
                dims(scale),
                value=ir.serde.deserialize_tensor(value),
            )
        return self._offsets[key]
