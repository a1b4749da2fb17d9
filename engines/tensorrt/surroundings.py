"""Precisions of the floats in a weakly typed network (TensorRT 8.6), where TensorRT would choose.

Left to itself, 8.6 takes FP32 for everything around the integer products of a network with Q/DQ,
though FP16 is allowed: attention then runs on CUDA cores. And it takes FP16 for a timestep in some
builds, where 999 · frequency has an error of up to 0.25 as a half, in radians (docs/tensorrt.md).
What layers are told:

1. A product of two computed values, neither a constant nor a dequantized one, and a softmax: FP16.
   These are attention's; the products of linears have a weight on one side, and stay integer ones.
2. What follows from a timestep before the first product: FP32.
3. Their outputs get that type too, but for the network's own, which keep the file's, and those that
   a QuantizeLayer reads: 8.6's bindings say that FP16 is not supported there.
4. All others: nothing. All floats in FP16 are more than 8.6.0 finds an implementation for.

A network with Q/DQ is told 1 and 2 ('attention') or nothing ('free'); one without is told 2.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ...errors import InputError
from .settings import ATTENTION_SURROUNDINGS

# Layers that hand on a timestep or compute its sinusoids, by TensorRT's names.
_BEFORE_PRODUCTS = (
    "ACTIVATION", "CONCATENATION", "ELEMENTWISE", "GATHER", "NORMALIZATION", "SCALE", "SHUFFLE",
    "SLICE", "UNARY",
)  # fmt: skip
_CASTS = ("CAST", "IDENTITY")  # told nothing: 8.6 ends the build for a type other than the cast's

HALF, SINGLE = "fp16", "fp32"  # as `trtexec` spells them


@dataclass(frozen=True)
class Told:
    """What the layers of a network were told: name → 'fp16' or 'fp32'.

    * `precisions`: what a layer computes in;
    * `output_types`: the type of its outputs, for those of these layers that were told one. All of
      these kinds of layers have one output in TensorRT; with more, all of them were told.

    Raises `InputError` for what is none.
    """

    precisions: dict[str, str] = field(default_factory=dict)
    output_types: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for given in (self.precisions, self.output_types):
            if not isinstance(given, dict) or any(v not in (HALF, SINGLE) for v in given.values()):
                raise InputError(
                    f"layers are told {HALF} or {SINGLE} by name, got {given!r}; build it again"
                )

    def count(self, precision: str) -> int:
        """How many layers compute in it."""
        return list(self.precisions.values()).count(precision)

    def only(self, taken: Callable[[str], bool]) -> Told:
        """Without the layers whose names are not `taken`, sorted: a line is the same when an
        engine is reused."""
        return Told(
            {name: kind for name, kind in sorted(self.precisions.items()) if taken(name)},
            {name: kind for name, kind in sorted(self.output_types.items()) if taken(name)},
        )


def tell_precisions(trt: Any, network: Any, surroundings: str) -> Told:
    """Tell a parsed, weakly typed network what its floats are, before it is built.

    surroundings: 'attention' or 'free', which differ in networks with Q/DQ nodes alone. The builder
    holds to what it is told with the flags FP16 and PREFER_PRECISION_CONSTRAINTS. Returns what was
    told, for the lines of other tools (`commands.py`).
    """
    floats = _Floats(trt, network)
    if floats.has_quantized and surroundings != ATTENTION_SURROUNDINGS:
        return Told()
    half = floats.attention() if floats.has_quantized else []
    single = floats.of_integers()
    precisions: dict[str, str] = {}
    output_types: dict[str, str] = {}
    for layers, dtype, name in (
        (half, trt.DataType.HALF, HALF),
        (single, trt.DataType.FLOAT, SINGLE),
    ):
        for layer in layers:
            layer.precision = dtype
            precisions[layer.name] = name
            outputs = range(layer.num_outputs)
            may = [index for index in outputs if floats.may_be_told(layer.get_output(index))]
            for index in may:
                layer.set_output_type(index, dtype)
            if len(may) == len(outputs):
                output_types[layer.name] = name
    return Told(precisions, output_types)


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
        """Whether a layer's output may be given a type (case 3)."""
        readers = self._readers[tensor.name]
        return not tensor.is_network_output and not any(_is(one, ("QUANTIZE",)) for one in readers)

    def attention(self) -> list[Any]:
        """Products of two computed values, and softmax. A weight or a dequantized value that was
        turned or reshaped is still none that was computed, and nor is a network's input."""
        computed: set[str] = set()
        found = []
        for layer in self._layers:
            names = [tensor.name for tensor in _inputs(layer)]
            if _is(layer, ("CONSTANT", "DEQUANTIZE")):
                continue
            if _is(layer, ("SHUFFLE",)) and names[0] not in computed:
                continue
            if _is(layer, ("SOFTMAX",)) or (
                _is(layer, ("MATRIX_MULTIPLY",)) and computed.issuperset(names)
            ):
                found.append(layer)
            computed |= _made(layer)
        return found

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
            elif names & reached and _is(layer, _BEFORE_PRODUCTS) and self._makes_floats(layer):
                found.append(layer)
                reached |= _made(layer)
        return found

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
