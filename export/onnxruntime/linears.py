"""Linears in ONNX Runtime's CPU operators; `lower_onnxruntime.py` numbers the cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from ..contents import LinearContents
from ..emit import Dims
from ..opsets import ComputeDtype
from ..passes.lower_qdq import LinearLowering
from ..realization import Form, Realization
from .int8_weight import emit_int8_weight
from .nbits_weight import emit_nbits_weight
from .rows import FLOAT, OFFSET, UINT8, emit_restored_groups
from .rules import nbits_block, realize_onnxruntime
from .split_rows import PARTS, SplitRows
from .token_rows import TokenRows

# MatMulNBits: 4 quantizes its input to 8 bits in blocks, 1 computes in float32.
_INTEGER_LEVEL, _FLOAT_LEVEL = 4, 1

# What 'qdit.linears' says of a linear beside its place and scheme (`LowerOnnxRuntimePass`).
FORM, COMPUTES, REASON = "form", "computes", "reason"


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
        self.records[contents.spec.name] |= self._facts(contents)

    def _facts(self, contents: LinearContents) -> dict[str, Any]:
        made = self._realization(contents)
        facts: dict[str, Any] = {FORM: made.form}
        if not made.is_exact(contents.scheme):
            facts[COMPUTES] = made.scheme.to_json()
        return facts | ({REASON: made.reason} if made.reason else {})

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
        return self._nbits_product(self._restored[key], contents, shape, _INTEGER_LEVEL)

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
    ) -> ir.Value:
        weight, attributes = emit_nbits_weight(
            self.emit, contents, self._block(contents), turned=level == _INTEGER_LEVEL
        )
        inputs = [x, *weight]
        if bias is not None:  # the sixth input, after zero points and group indices
            inputs += [None] * (5 - len(inputs)) + [bias]
        return self.emit.contrib(
            "MatMulNBits", inputs, name, FLOAT, shape, **attributes, accuracy_level=level
        )
