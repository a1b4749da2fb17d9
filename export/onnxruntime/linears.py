"""Linears in ONNX Runtime's CPU operators; `lower_onnxruntime.py` numbers the cases."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import onnx_ir as ir

from ..contents import LinearContents
from ..emit import Dims
from ..opsets import ComputeDtype
from ..passes.lower_qdq import LinearLowering
from ..realization import Form, Realization
from .facts import realization_facts
from .int8_weight import emit_int8_weight
from .nbits_weight import emit_nbits_weight
from .rows import FLOAT, OFFSET, UINT8, emit_columns, emit_restored_groups
from .rules import nbits_block, realize_onnxruntime
from .split_rows import PARTS, SplitRows
from .token_rows import TokenRows

# MatMulNBits: 4 quantizes its input to 8 bits in blocks, 1 computes in float32.
_INTEGER_LEVEL, _FLOAT_LEVEL = 4, 1

# Channels that MatMulNBits adds up at level 4 in one product. Its rounding error grows with them:
# 7.3e-7, 8.2e-7 and 1.04e-6 were measured at K = 1152, 2304 and 4608 (groups of 128, after GELU).
MOST_CHANNELS = 2304


class OnnxRuntimeLinears(LinearLowering):
    """y = Q_a(x) Ŵ + b by the realization of each linear; what has none is as in `qdq`."""

    def __init__(self, model: ir.Model, dtype: ComputeDtype) -> None:
        super().__init__(model, dtype)
        self._tokens = TokenRows(self.emit)
        self._split = SplitRows(self.emit)
        self._restored: dict[tuple[int, int], ir.Value] = {}

    def product(self, x: ir.Value, contents: LinearContents, shape: ir.Shape) -> ir.Value:
        emitters: dict[Form, Callable[[ir.Value, LinearContents, ir.Shape], ir.Value]] = {
            "int8": self._int8,
            "int8-split": self._int8_split,
            "nbits": self._nbits,
            "nbits-split": self._nbits_split,
            "nbits-float": self._nbits_float,
        }
        emit = emitters.get(self._realization(contents).form, super().product)
        return emit(x, contents, shape)

    def lower(self, node: ir.Node, contents: LinearContents) -> None:
        super().lower(node, contents)
        self.records[contents.spec.name] |= realization_facts(
            self._realization(contents), contents.scheme
        )

    def _realization(self, contents: LinearContents) -> Realization:
        return realize_onnxruntime(contents.spec, contents.scheme)

    def _int8(self, x: ir.Value, contents: LinearContents, shape: ir.Shape) -> ir.Value:
        name = contents.spec.name
        integers, scale = self._tokens.quantize(x, contents.scheme.activation_bits)
        sums = self._integer_product(integers, contents, f"{name}/sums", shape)
        product = self.emit.node("Mul", [sums, scale], self.product_name(contents), FLOAT, shape)
        return self.add_bias(product, contents, shape)

    def _int8_split(self, x: ir.Value, contents: LinearContents, shape: ir.Shape) -> ir.Value:
        name = contents.spec.name
        integers, scale = self._split.integers(x)
        parts = [PARTS, *shape]
        sums = self._integer_product(integers, contents, f"{name}/sums", parts)
        scaled = self.emit.node("Mul", [sums, scale], f"{name}/parts", FLOAT, parts)
        return self._whole(scaled, contents, shape)

    def _integer_product(
        self, integers: ir.Value, contents: LinearContents, name: str, shape: Dims
    ) -> ir.Value:
        """One int32 sum over K for each output, times the channel's scale, in float32."""
        weight = emit_int8_weight(self.emit, contents)
        inputs = [
            integers,
            weight.values,
            self.emit.constant(1.0, FLOAT),  # the token's scale comes after: here it is one number
            weight.scale,
            self.emit.constant(OFFSET, UINT8),
            weight.zero_point,
        ]
        return self.emit.contrib("MatMulIntegerToFloat", inputs, name, FLOAT, shape)

    def _nbits(self, x: ir.Value, contents: LinearContents, shape: ir.Shape) -> ir.Value:
        size = self._realization(contents).scheme.activation_group_size(contents.spec.in_features)
        key = (id(x), size)
        if key not in self._restored:
            self._restored[key] = emit_restored_groups(self.emit, x, size, f"{x.name}/a8_{size}")
        parts = block_parts(contents.spec.in_features, self._block(contents))
        if len(parts) == 1:
            return self._nbits_product(self._restored[key], contents, shape, _INTEGER_LEVEL)
        return self._nbits_parts(self._restored[key], contents, shape, parts)

    def _nbits_parts(
        self, x: ir.Value, contents: LinearContents, shape: ir.Shape, parts: list[range]
    ) -> ir.Value:
        """Products of neighbouring channels, added up: a wide one rounds too much."""
        name, block = contents.spec.name, self._block(contents)
        total: ir.Value | None = None
        for blocks in parts:
            start, stop = blocks.start * block, blocks.stop * block
            place = f"{name}/from_{start}"
            own = emit_columns(self.emit, x, start, stop, f"{place}/input")
            made = self._matmul_nbits(
                own, contents, None, f"{place}/product", shape, _INTEGER_LEVEL, blocks
            )
            if total is None:
                total = made
            else:
                last = blocks is parts[-1]
                sum_name = self.product_name(contents) if last else f"{place}/sum"
                total = self.emit.node("Add", [total, made], sum_name, FLOAT, shape)
        if total is None:
            raise ValueError(f"{name} has no channels")
        return self.add_bias(total, contents, shape)

    def _nbits_float(self, x: ir.Value, contents: LinearContents, shape: ir.Shape) -> ir.Value:
        return self._nbits_product(x, contents, shape, _FLOAT_LEVEL)

    def _nbits_product(
        self, x: ir.Value, contents: LinearContents, shape: ir.Shape, level: int
    ) -> ir.Value:
        """MatMulNBits with the bias inside."""
        name = contents.spec.name
        bias = None if contents.bias is None else self.bias(contents.bias, f"{name}.bias")
        return self._matmul_nbits(x, contents, bias, f"{name}.output", shape, level)

    def _nbits_split(self, x: ir.Value, contents: LinearContents, shape: ir.Shape) -> ir.Value:
        parts = self._split.groups(x, self._block(contents))
        made = self._matmul_nbits(
            parts,
            contents,
            None,
            f"{contents.spec.name}/parts",
            [PARTS, *shape],
            _INTEGER_LEVEL,
        )
        return self._whole(made, contents, shape)

    def _whole(self, parts: ir.Value, contents: LinearContents, shape: ir.Shape) -> ir.Value:
        """The parts' products added up, and the bias."""
        product = self._split.add_up(parts, self.product_name(contents))
        return self.add_bias(product, contents, shape)

    def _block(self, contents: LinearContents) -> int:
        block = nbits_block(contents.spec, contents.scheme)
        if block is None:
            raise ValueError(f"{contents.spec.name} has no block of MatMulNBits")
        return block

    def _matmul_nbits(
        self,
        x: ir.Value,
        contents: LinearContents,
        bias: ir.Value | None,
        name: str,
        shape: Dims,
        level: int,
        blocks: range | None = None,
    ) -> ir.Value:
        """MatMulNBits of all channels, or of those of some `blocks`."""
        weight, attributes = emit_nbits_weight(
            self.emit,
            contents,
            self._block(contents),
            turned=level == _INTEGER_LEVEL,
            blocks=blocks,
        )
        inputs = [x, *weight]
        if bias is not None:  # the sixth input, after zero points and group indices
            inputs += [None] * (5 - len(inputs)) + [bias]
        return self.emit.contrib(
            "MatMulNBits", inputs, name, FLOAT, shape, **attributes, accuracy_level=level
        )


def block_parts(channels: int, block: int) -> list[range]:
    """All blocks of K = `channels`, in parts of equal size of at most `MOST_CHANNELS` each."""
    count, blocks = -(-channels // MOST_CHANNELS), channels // block
    ends = [blocks * part // count for part in range(count + 1)]
    return [range(start, stop) for start, stop in pairwise(ends)]
