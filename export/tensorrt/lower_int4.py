"""Lower linears to products with blocked INT4 weights: the `tensorrt-int4` target."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import onnx_ir as ir

from ..contents import LinearContents
from ..opsets import ComputeDtype, onnx_dtype
from ..passes.lower_qdq import LinearLowering
from ..qdq_weight import emit_weight, integer_tensor
from .lower_int8 import PRECISION

BLOCKS = (128, 64)  # TensorRT's, the coarser one first


class LowerInt4Pass(ir.passes.InPlacePass):
    """Replace every `qdit::GroupQuantLinear(layer)` by a float product with INT4 weights.

    Requires: contents for every layer; no quantized activations; quantized weights symmetric, of 4
    bits at most, in groups that are multiples of 64. Ensures: no node of domain 'qdit';
    'qdit.linears' with 'precision' ('INT4' or 'FP16'). Cases:

    1. Groups of g: INT4 [K, N] → DequantizeLinear(axis=0, block_size=b) → MatMul, b the coarser of
       128 and 64 that divides g; a group's scale is repeated over its blocks. Nothing stands
       between DequantizeLinear and MatMul, or TensorRT would dequantize ahead of time.
    2. Scales in the compute dtype. Integer scales' factors s·m have 15 significant bits: under
       float16 they stay float32, followed by a Cast.
    3. Unquantized weights: a float initializer.
    """

    def __init__(self, contents: Mapping[str, LinearContents], dtype: ComputeDtype) -> None:
        super().__init__()
        self.contents = contents
        self.dtype: ComputeDtype = dtype

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return _Int4Lowering(model, self.dtype).lower_all(self.contents)


def block_size(group: int) -> int:
    """TensorRT's block for weights in groups of `group`."""
    return next(block for block in BLOCKS if group % block == 0)


class _Int4Lowering(LinearLowering):
    def lower(self, node: ir.Node, contents: LinearContents) -> None:
        super().lower(node, contents)
        quantized = contents.scheme.quantizes_weights
        self.records[contents.spec.name][PRECISION] = "INT4" if quantized else "FP16"

    def activation(self, x: ir.Value, contents: LinearContents) -> ir.Value:
        if contents.scheme.quantizes_activations:
            raise ValueError(f"{contents.spec.name}: INT4 is weight-only; check the capabilities")
        return x

    def matrix(self, contents: LinearContents) -> ir.Value:
        if not contents.scheme.quantizes_weights:
            return emit_weight(self.emit, contents, self.dtype)
        spec, scheme = contents.spec, contents.scheme
        k, n, name = spec.in_features, spec.out_features, f"{spec.name}.weight"
        group = scheme.weight_group_size(k)
        block, compute = block_size(group), onnx_dtype(self.dtype)
        exact = scheme.has_integer_scales or scheme.scale_dtype == "float32"
        scales = ir.DataType.FLOAT if exact else compute
        integers = self.emit.initializer(
            name, ir.DataType.INT4, [k, n], partial(_integers, contents)
        )
        scale = self.emit.initializer(
            f"{name}_scale",
            scales,
            [k // block, n],
            partial(_scales, contents, group // block, scales),
        )
        matrix = self.emit.node(
            "DequantizeLinear",
            [integers, scale],
            f"{name}/dequantized",
            scales,
            [k, n],
            axis=0,
            block_size=block,
        )
        if scales == compute:
            return matrix
        return self.emit.node("Cast", [matrix], f"{name}/cast", compute, [k, n], to=compute.value)


def _integers(contents: LinearContents) -> ir.TensorProtocol:
    return integer_tensor(contents.quantized().values.T, ir.DataType.INT4)


def _scales(contents: LinearContents, repeats: int, dtype: ir.DataType) -> ir.TensorProtocol:
    scale = contents.quantized().scale.T.repeat_interleave(repeats, dim=0)
    return ir.tensor(np.ascontiguousarray(scale.numpy(), dtype.numpy()), dtype)
