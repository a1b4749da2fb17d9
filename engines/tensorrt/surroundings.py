"""Precisions of the floats in a weakly typed network (TensorRT 8.6), where TensorRT would choose.

Left to itself, 8.6 takes FP32 for everything around the integer products of a network with Q/DQ,
though FP16 is allowed: attention then runs on CUDA cores, and the engine at half the speed of an
FP16 one (docs/tensorrt.md). With 'fp16' the layers that compute floats are told to be FP16; all of
them are more than 8.6.0 has an implementation for, so that this is not the default.

One place is told to be FP32, but in a network with Q/DQ that is left free: what follows from a
timestep before the first product. There 8.6 may take FP16, and 999 · frequency has an error of up
to 0.25 as a half, in radians; which of both it took changed from build to build, and DiT-XL/2's
error at t = 900 between 0.0025 and 0.025.

Not told anything, for the reasons given:

* QuantizeLayers and DequantizeLayers, and the output that a QuantizeLayer reads. The bindings of
  8.6 say of both layers that FP16 is not supported where a type is constrained.
* CastLayers: 8.6 ends the build where an output type other than the cast's own was asked for.
* What has DequantizeLayers before it alone, that is a weight's transposition and the product, which
  is an integer one by these, and constants, which are folded.
* What leads from an integer product to the next QuantizeLayer element by element (bias and GELU):
  the product's kernel does that in registers, and returns INT8. A rounding between would end that.

A NormalizationLayer computes in FP32 whatever its precision, which is of its ends alone (8.6's
bindings on `compute_precision`). A softmax must be told, or attention is not one kernel; the ones
of Myelin for FP16 (`mha`) are those of FP16 engines, whose accuracy was measured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .settings import FP16_SURROUNDINGS

# Layers that compute or hand on floats, by TensorRT's names. None that reduces: a sum of squares
# leaves what a half holds at 65504.
_TOLD = (
    "ACTIVATION", "CONCATENATION", "CONVOLUTION", "ELEMENTWISE", "FULLY_CONNECTED", "GATHER",
    "MATRIX_MULTIPLY", "NORMALIZATION", "SCALE", "SHUFFLE", "SLICE", "SOFTMAX", "UNARY",
)  # fmt: skip
_PRODUCTS = ("CONVOLUTION", "FULLY_CONNECTED", "MATRIX_MULTIPLY")
_AS_THEY_ARE = tuple(kind for kind in _TOLD if kind not in _PRODUCTS)
_BY_ELEMENT = ("ACTIVATION", "ELEMENTWISE", "SCALE", "UNARY")
_CASTS = ("CAST", "IDENTITY")


@dataclass(frozen=True)
class Told:
    """How many layers were told to be FP16, and how many FP32."""

    half: int
    single: int


def tell_precisions(trt: Any, network: Any, surroundings: str) -> Told:
    """Tell a parsed, weakly typed network what its floats are, before it is built.

    surroundings: 'fp16' tells the layers around Q/DQ nodes to be FP16, where there are any; 'free'
    tells nothing in a network that has some. The builder holds to it with the flags FP16 and
    PREFER_PRECISION_CONSTRAINTS.
    """
    floats = _Floats(trt, network)
    if floats.has_quantized and surroundings != FP16_SURROUNDINGS:
        return Told(0, 0)
    exact = floats.of_integers()
    half = floats.around_products()
    kept = {name for layer in exact for name in _made(layer)}
    half = [layer for layer in half if not _made(layer) & kept]
    for layers, precision in ((exact, trt.DataType.FLOAT), (half, trt.DataType.HALF)):
        for layer in layers:
            layer.precision = precision
            for index in range(layer.num_outputs):
                if floats.may_be_told(layer.get_output(index)):
                    layer.set_output_type(index, precision)
    return Told(len(half), len(exact))


class _Floats:
    """A network's layers in their order, which is that of the file: makers before readers."""

    def __init__(self, trt: Any, network: Any) -> None:
        self._types = (trt.DataType.FLOAT, trt.DataType.HALF)
        self._layers = [network.get_layer(index) for index in range(network.num_layers)]
        self._readers: dict[str, list[Any]] = defaultdict(list)
        for layer in self._layers:
            for tensor in _inputs(layer):
                self._readers[tensor.name].append(layer)

    @property
    def has_quantized(self) -> bool:
        return any(_is(layer, ("QUANTIZE",)) for layer in self._layers)

    def may_be_told(self, tensor: Any) -> bool:
        """Whether a layer's output may be given a type: see this module's docstring. A network's
        own outputs keep the file's."""
        readers = self._readers[tensor.name]
        return not tensor.is_network_output and not any(_is(one, ("QUANTIZE",)) for one in readers)

    def of_integers(self) -> list[Any]:
        """What follows from integers that were cast to floats, up to the first products."""
        reached: set[str] = set()
        found = []
        for layer in self._layers:
            names = {tensor.name for tensor in _inputs(layer)}
            if _is(layer, _CASTS):
                integers = any(tensor.dtype not in self._types for tensor in _inputs(layer))
                if self._makes_floats(layer) and (integers or names & reached):
                    reached |= _made(layer)
            elif names & reached and _is(layer, _AS_THEY_ARE) and self._makes_floats(layer):
                found.append(layer)
                reached |= _made(layer)
        return found

    def around_products(self) -> list[Any]:
        """The layers to be FP16 in a network with Q/DQ nodes; none in another."""
        if not self.has_quantized:
            return []
        constant, dequantized, integer = self._sides()
        epilogues = self._epilogues(constant, integer)
        return [
            layer
            for layer in self._layers
            if _is(layer, _TOLD)
            and self._makes_floats(layer)
            and not _made(layer) & (constant | dequantized | integer | epilogues)
        ]

    def _sides(self) -> tuple[set[str], set[str], set[str]]:
        """Tensors that follow from constants alone, that are dequantized values and nothing else,
        and that are made by integer products."""
        constant: set[str] = set()
        dequantized: set[str] = set()
        integer: set[str] = set()
        for layer in self._layers:
            names = {tensor.name for tensor in _inputs(layer)}
            if _is(layer, ("CONSTANT",)) or (names and names <= constant):
                constant |= _made(layer)
            if _is(layer, ("DEQUANTIZE",)) or (_is(layer, ("SHUFFLE",)) and names <= dequantized):
                dequantized |= _made(layer)
            elif _is(layer, _PRODUCTS) and names & dequantized and names <= dequantized | constant:
                integer |= _made(layer)
        return constant, dequantized, integer

    def _epilogues(self, constant: set[str], integer: set[str]) -> set[str]:
        """Tensors between an integer product and QuantizeLayers, element by element."""
        after = set(integer)
        for layer in self._layers:
            names = {tensor.name for tensor in _inputs(layer)} - constant
            if _is(layer, _BY_ELEMENT) and names and names <= after:
                after |= _made(layer)
        leads: set[str] = set()  # tensors that QuantizeLayers alone read in the end
        for layer in reversed(self._layers):
            for name in _made(layer):
                readers = self._readers[name]
                if readers and all(
                    _is(one, ("QUANTIZE",)) or (_is(one, _BY_ELEMENT) and _made(one) <= leads)
                    for one in readers
                ):
                    leads.add(name)
        return after & leads

    def _makes_floats(self, layer: Any) -> bool:
        """Integers of shapes and indices pass through the same kinds of layers."""
        made = [layer.get_output(index) for index in range(layer.num_outputs)]
        return all(tensor.dtype in self._types for tensor in made)


def _is(layer: Any, kinds: Iterable[str]) -> bool:
    return layer.type.name in kinds


def _inputs(layer: Any) -> list[Any]:
    """Without the optional ones that are not there."""
    given = [layer.get_input(index) for index in range(layer.num_inputs)]
    return [tensor for tensor in given if tensor is not None]


def _made(layer: Any) -> set[str]:
    return {layer.get_output(index).name for index in range(layer.num_outputs)}
