"""Lower linears to INT8 products with static scales: the `tensorrt-int8` target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ...errors import InputError
from ..contents import LinearContents
from ..opsets import ComputeDtype, onnx_dtype
from ..opsets import torch_dtype as as_torch_dtype
from ..passes.lower_qdq import LinearLowering
from .versions import Features

_INT8 = ir.DataType.INT8
PRECISION = "precision"  # of a linear's product, in its record: what the ledger compares with
INPUT_SCALE = "input_scale"


@dataclass(frozen=True)
class Int8Weight:
    """A weight [N, K] as int8 integers and one float32 scale a channel [N]."""

    integers: Tensor
    scale: Tensor

    @classmethod
    def of(cls, contents: LinearContents) -> Int8Weight:
        """Integers of 8 bits at most by channel, or q·m of integer scales: nothing is rounded."""
        weight = contents.quantized()
        if weight.multiplier is not None:
            return cls(weight.int8_values(), weight.channel_scale[:, 0])
        return cls(weight.values, weight.scale[:, 0])


class LowerInt8Pass(ir.passes.InPlacePass):
    """Replace every `qdit::GroupQuantLinear(layer)` by a product that TensorRT runs in INT8.

    Requires: contents for every layer; a scale by `LinearSpec.input_name` for each layer whose
    activations are quantized, or `InputError`; weights of such layers symmetric with one scale a
    channel.
    Ensures: no node of domain 'qdit'; 'qdit.linears' as `LowerQdqPass` writes it, with 'precision'
    ('INT8' or 'FP16') and 'input_scale'. Cases:

    1. Quantized activations: QuantizeLinear → DequantizeLinear with one constant scale, INT8, zero
       point 0, once for linears that read one value with one scale.
    2. Their weights [N, K], by a version that takes INT8 constants: DequantizeLinear(axis=0).
    3. By an older one: float32 s·q → QuantizeLinear(axis=0) → DequantizeLinear(axis=0), which
       gives q back exactly: |s·q/s − q| is far below a half.
    4. After 2 and 3: Transpose to [K, N], then MatMul. TensorRT folds it; channels stay axis 0, as
       in the pattern of NVIDIA's own exporters.
    5. Weight-only and 16-bit linears: MatMul with a float initializer of the very values; there is
       no INT8 product to make of them.
    6. Scales are in the compute dtype where the version reads that, else in float32; the record
       holds the scale as it was rounded.
    """

    def __init__(
        self,
        contents: Mapping[str, LinearContents],
        scales: Mapping[str, float],
        dtype: ComputeDtype,
        features: Features,
    ) -> None:
        super().__init__()
        for entry in contents.values():
            if entry.scheme.quantizes_activations and entry.spec.input_name not in scales:
                raise InputError(
                    f"{entry.spec.input_name} has no static scale; measure its range first"
                )
        self.contents = contents
        self.scales = scales
        self.dtype: ComputeDtype = dtype
        self.features = features

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return _Int8Lowering(model, self.dtype, self.scales, self.features).lower_all(self.contents)


class _Int8Lowering(LinearLowering):
    def __init__(
        self,
        model: ir.Model,
        dtype: ComputeDtype,
        scales: Mapping[str, float],
        features: Features,
    ) -> None:
        super().__init__(model, dtype)
        self.scales = scales
        self.features = features
        self._operands: dict[tuple[int, float], ir.Value] = {}

    @property
    def _scale_dtype(self) -> ir.DataType:
        return onnx_dtype(self.dtype) if self.features.half_scales else ir.DataType.FLOAT

    def lower(self, node: ir.Node, contents: LinearContents) -> None:
        super().lower(node, contents)
        record = self.records[contents.spec.name]
        record[PRECISION] = "INT8" if contents.scheme.quantizes_activations else "FP16"
        if contents.scheme.quantizes_activations:
            scale = np.asarray(self.scales[contents.spec.input_name], self._scale_dtype.numpy())
            record[INPUT_SCALE] = float(scale)

    def activation(self, x: ir.Value, contents: LinearContents) -> ir.Value:
        if not contents.scheme.quantizes_activations:
            return x
        scale = self.scales[contents.spec.input_name]
        key = (id(x), scale)
        if key not in self._operands:
            self._operands[key] = self._quantize_input(x, scale)
        return self._operands[key]

    def matrix(self, contents: LinearContents) -> ir.Value:
        spec = contents.spec
        n, k = spec.out_features, spec.in_features
        compute = onnx_dtype(self.dtype)
        if not contents.scheme.quantizes_activations:
            load = partial(_float_matrix, contents, as_torch_dtype(self.dtype))
            return self.emit.initializer(f"{spec.name}.weight", compute, [k, n], load)
        name = f"{spec.name}.weight"
        scale = self._initializer(
            f"{name}_scale", self._scale_dtype, [n], partial(_scale, contents)
        )
        zero = self._zero_point(f"{name}_zero_point", [n])
        if self.features.int8_weights:
            values = self._initializer(name, _INT8, [n, k], partial(_integers, contents))
        else:
            float32 = ir.DataType.FLOAT
            floats = self._initializer(name, float32, [n, k], partial(_restored, contents))
            values = self.emit.node(
                "QuantizeLinear", [floats, scale, zero], f"{name}/quantized", _INT8, [n, k], axis=0
            )
        matrix = self.emit.node(
            "DequantizeLinear",
            [values, scale, zero],
            f"{name}/dequantized",
            compute,
            [n, k],
            axis=0,
        )
        return self.emit.node("Transpose", [matrix], f"{name}/matrix", compute, [k, n], perm=[1, 0])

    def _quantize_input(self, x: ir.Value, scale: float) -> ir.Value:
        if x.dtype is None or x.shape is None:
            raise ValueError(f"the dtype or shape of {x.name} is not known")
        label = f"{x.name}/int8"
        number = self._initializer(
            f"{label}_scale", self._scale_dtype, [], lambda: np.array(scale, np.float32)
        )
        zero = self._zero_point("zero_point/int8", [])
        quantized = self.emit.node(
            "QuantizeLinear", [x, number, zero], f"{label}/quantized", _INT8, x.shape
        )
        return self.emit.node(
            "DequantizeLinear", [quantized, number, zero], f"{label}/dequantized", x.dtype, x.shape
        )

    def _zero_point(self, name: str, shape: list[int]) -> ir.Value:
        """Zeros of INT8, under a name a shape: TensorRT takes them for constants of the network."""
        existing = self.graph.initializers.get(name)
        if existing is not None:
            return existing
        return self._initializer(name, _INT8, shape, lambda: np.zeros(shape, np.int8))

    def _initializer(
        self, name: str, dtype: ir.DataType, shape: list[int], load: Callable[[], np.ndarray]
    ) -> ir.Value:
        def tensor() -> ir.TensorProtocol:
            array = np.asarray(load(), dtype.numpy())
            return ir.tensor(array.reshape(shape, order="C"), dtype)

        return self.emit.initializer(name, dtype, shape, tensor)


def _float_matrix(contents: LinearContents, dtype: torch.dtype) -> ir.TensorProtocol:
    weight = contents.quantized().dequantize() if contents.scheme.quantizes_weights else None
    matrix = contents.weight() if weight is None else weight
    return ir.tensor(matrix.to(dtype).T.contiguous().numpy())


def _integers(contents: LinearContents) -> np.ndarray:
    return np.asarray(Int8Weight.of(contents).integers.numpy())


def _scale(contents: LinearContents) -> np.ndarray:
    return np.asarray(Int8Weight.of(contents).scale.numpy())


def _restored(contents: LinearContents) -> np.ndarray:
    weight = Int8Weight.of(contents)
    return np.asarray((weight.integers.float() * weight.scale[:, None]).numpy())
