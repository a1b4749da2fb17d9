"""A float input as the sum of three 8-bit parts: integer products that do not quantize it.

Each part is the symmetric 8-bit quantization of what the parts before it left over, so the largest
leftover of a row, or group, is divided by 254 three times: 1 / 254³ = 6e-8 of the largest value,
which is float32's own step. The parts are rows of one product, whose results are added up.
Adding them costs what float32 costs too: measured 4e-7 relative error for both (docs/targets.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from ..emit import Emitter
from .rows import (
    FLOAT,
    INT64,
    OFFSET,
    UINT8,
    dims,
    emit_flat,
    emit_groups,
    emit_scale,
    emit_turned,
)

PARTS = 3
# Far below the third part's scale of any activation, and a normal number still.
_LEAST_SCALE = 2.0**-100


class SplitRows:
    """Splits inputs [B, K] of few rows; all linears that read one value share its parts."""

    def __init__(self, emit: Emitter) -> None:
        self._emit = emit
        self._grouped: dict[tuple[int, int], ir.Value] = {}
        self._integers: dict[int, tuple[ir.Value, ir.Value]] = {}

    def groups(self, x: ir.Value, size: int) -> ir.Value:
        """Float parts [3, B, K] that 8-bit quantization in groups of `size` leaves as they are.

        Every other group is negated (`rows.block_signs`).
        """
        key = (id(x), size)
        if key not in self._grouped:
            prefix = f"{x.name}/split_g{size}"
            parts = self._split(emit_groups(self._emit, x, size, prefix), prefix)
            flat = [
                self._turned(integers, scale, f"{prefix}/{i}")
                for i, (integers, scale, _) in enumerate(parts)
            ]
            self._grouped[key] = self._stack(flat, f"{prefix}/parts")
        return self._grouped[key]

    def integers(self, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """(q + 128 as UINT8 [3, B, K], s [3, B, 1]) with one scale a row and part."""
        if id(x) not in self._integers:
            emit, prefix = self._emit, f"{x.name}/split"
            parts = self._split(x, prefix)
            whole = self._stack([integers for integers, _, _ in parts], f"{prefix}/integers")
            shifted = emit.node(
                "Add",
                [whole, emit.constant(float(OFFSET), FLOAT)],
                f"{prefix}/shifted",
                FLOAT,
                dims(whole),
            )
            unsigned = emit.node(
                "Cast", [shifted], f"{prefix}/quantized", UINT8, dims(whole), to=UINT8.value
            )
            scale = self._stack([scale for _, scale, _ in parts], f"{prefix}/scales")
            self._integers[id(x)] = unsigned, scale
        return self._integers[id(x)]

    def _turned(self, integers: ir.Value, scale: ir.Value, prefix: str) -> ir.Value:
        """integers · scale [..., G, g] → [..., K], every other group negated."""
        turned = self._emit.node(
            "Mul",
            [integers, emit_turned(self._emit, scale, prefix)],
            f"{prefix}/turned_groups",
            FLOAT,
            dims(integers),
        )
        return emit_flat(self._emit, turned, f"{prefix}/flat")

    def add_up(self, products: ir.Value, name: str) -> ir.Value:
        """Products [3, B, N] of the parts → their sum [B, N]."""
        first = self._emit.constant([0], INT64)
        return self._emit.node(
            "ReduceSum", [products, first], name, FLOAT, dims(products)[1:], keepdims=0
        )

    def _split(self, x: ir.Value, prefix: str) -> list[tuple[ir.Value, ir.Value, ir.Value]]:
        """(integers, scale, integers · scale) of each part, quantized over the last dimension."""
        emit, left = self._emit, x
        parts = []
        for i in range(PARTS):
            own = f"{prefix}/{i}"
            scale = emit_scale(emit, left, 8, own, _LEAST_SCALE)
            steps = emit.node("Div", [left, scale], f"{own}/steps", FLOAT, dims(x))
            integers = emit.node("Round", [steps], f"{own}/integers", FLOAT, dims(x))
            restored = emit.node("Mul", [integers, scale], f"{own}/restored", FLOAT, dims(x))
            parts.append((integers, scale, restored))
            if i + 1 < PARTS:
                left = emit.node("Sub", [left, restored], f"{own}/left", FLOAT, dims(x))
        return parts

    def _stack(self, parts: Sequence[ir.Value], name: str) -> ir.Value:
        """Equal shapes → one value with the parts along a new first dimension."""
        emit = self._emit
        shape = dims(parts[0])
        first = emit.constant([0], INT64)
        raised = [
            emit.node("Unsqueeze", [part, first], f"{name}/{i}", FLOAT, [1, *shape])
            for i, part in enumerate(parts)
        ]
        return emit.node("Concat", raised, name, FLOAT, [len(parts), *shape], axis=0)
