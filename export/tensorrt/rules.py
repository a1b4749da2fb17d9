"""Rules that an ONNX file must keep to be parsed and built by a TensorRT version.

Each is a numbered function. Source: the asserts of the parser's own code (github
onnx/onnx-tensorrt, branches 8.6-EA and 10.1-GA), its tables of operators, and NVIDIA's guides
'Explicit Quantization' and 'Extending TensorRT with Custom Layers' for 10 and 11.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import NodeProto, TensorProto

from ...errors import InputError
from .lower_int4 import BLOCKS
from .operators import supported_operators
from .parsed import ParsedFile, attribute, place, type_name
from .versions import Features, TensorRtVersion, features

_OLDEST_OPSET = 9
_MOST_DIMENSIONS = 8  # nvinfer1::Dims::MAX_DIMS
_RESERVED = ("", "trt", "tensorrt", "std")  # plugin namespaces
_STANDARD = ("", "ai.onnx")

_T = TensorProto
_ALWAYS = {_T.FLOAT, _T.FLOAT16, _T.DOUBLE, _T.INT32, _T.INT64, _T.INT8, _T.BOOL}
_SINCE_10 = {_T.BFLOAT16, _T.INT4, _T.FLOAT8E4M3FN}
_SINCE_10_8 = {_T.FLOAT4E2M1}


@dataclass(frozen=True)
class Violation:
    """One rule that one place breaks."""

    rule: str
    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.rule} {self.where}: {self.text}"


Rule = Callable[[ParsedFile, Features], Iterator[Violation]]


def check_file(path: Path, version: str) -> list[Violation]:
    """Every violation in an ONNX file, in the order of the rules; empty: TensorRT should take it.

    `version`: '8.6', '10', '10.9', '11' … Raises `InputError` for a version or path that is none.
    """
    if not path.is_file():
        raise InputError(f"no such file: {path}; give the path of an .onnx file")
    wanted = features(TensorRtVersion.parse(version))
    file = ParsedFile.read(path)
    return [violation for rule in RULES for violation in rule(file, wanted)]


def rule_1_opset(file: ParsedFile, wanted: Features) -> Iterator[Violation]:
    """R1: the opset is between 9 and the newest that the version documents."""
    if not _OLDEST_OPSET <= file.opset <= wanted.newest_opset:
        yield Violation(
            "R1",
            "the model",
            f"opset must be {_OLDEST_OPSET} … {wanted.newest_opset}, got {file.opset}",
        )


def rule_2_operators(file: ParsedFile, wanted: Features) -> Iterator[Violation]:
    """R2: every operator is imported: a standard one, a function of the model, or a plugin."""
    known = supported_operators(wanted.version)
    for node in file.model.graph.node:
        yield from _unknown_operator(node, known, file, wanted, ())


def _unknown_operator(
    node: NodeProto,
    known: frozenset[str],
    file: ParsedFile,
    wanted: Features,
    inside: tuple[str, ...],
) -> Iterator[Violation]:
    where = " in ".join((place(node), *reversed(inside)))
    if node.domain in _STANDARD:
        if node.op_type not in known:
            yield Violation("R2", where, f"no importer for {node.op_type}")
        return
    if attribute(node, "plugin_namespace") is not None:
        return  # rule 3
    function = file.functions.get((node.domain, node.op_type))
    if function is None:
        yield Violation(
            "R2", where, f"no importer, function or plugin for {node.domain}::{node.op_type}"
        )
    elif not wanted.functions:
        yield Violation("R2", where, f"local functions need TensorRT 10, got {wanted.version}")
    elif function.name not in inside:
        for inner in function.node:
            yield from _unknown_operator(inner, known, file, wanted, (*inside, function.name))


def rule_3_plugins(file: ParsedFile, wanted: Features) -> Iterator[Violation]:
    """R3: plugin nodes name a namespace of their own and version 1, and ask for ahead-of-time."""
    for node in file.model.graph.node:
        namespace = attribute(node, "plugin_namespace")
        if namespace is None or node.domain in _STANDARD:
            continue
        where = place(node)
        if not wanted.plugins:
            yield Violation(
                "R3", where, f"ahead-of-time plugins need TensorRT 10.9, got {wanted.version}"
            )
        if namespace in _RESERVED or "." in str(namespace):
            yield Violation(
                "R3",
                where,
                f"plugin_namespace must not be empty, trt, tensorrt or std, nor hold a dot, got "
                f"{namespace!r}",
            )
        if attribute(node, "plugin_version") != "1":
            yield Violation(
                "R3",
                where,
                f"plugin_version must be '1', got {attribute(node, 'plugin_version')!r}",
            )
        if attribute(node, "aot") != 1:
            yield Violation("R3", where, f"aot must be 1, got {attribute(node, 'aot')!r}")


def rule_4_types(file: ParsedFile, wanted: Features) -> Iterator[Violation]:
    """R4: constants and inputs have types that TensorRT has; UINT8 is for inputs and outputs."""
    allowed = set(_ALWAYS)
    if wanted.version >= (10, 0, 0):
        allowed |= _SINCE_10
    if wanted.version >= (10, 8, 0):
        allowed |= _SINCE_10_8
    for name, tensor in file.initializers.items():
        if tensor.data_type not in allowed:
            yield Violation("R4", name, f"no constants of {type_name(tensor.data_type)}")
    given = {value.name for value in file.model.graph.initializer}
    for value in file.model.graph.input:
        kind = value.type.tensor_type.elem_type
        if value.name not in given and kind not in allowed | {_T.UINT8}:
            yield Violation("R4", value.name, f"no inputs of {type_name(kind)}")


def rule_5_int8_constants(file: ParsedFile, wanted: Features) -> Iterator[Violation]:
    """R5: INT8 and INT4 constants are read by DequantizeLinear, as zero points, or by plugins.

    Before TensorRT 10 weights are quantized from floats: its guide has no INT8 constant.
    """
    for name, tensor in file.initializers.items():
        if tensor.data_type not in (_T.INT8, _T.INT4):
            continue
        kind = type_name(tensor.data_type)
        for node in file.readers.get(name, []):
            if attribute(node, "plugin_namespace") is not None:
                continue
            is_data = bool(node.input) and node.input[0] == name
            if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                yield Violation(
                    "R5", name, f"an {kind} constant is read by {node.op_type} ({place(node)})"
                )
            elif is_data and not wanted.int8_weights:
                yield Violation(
                    "R5",
                    name,
                    f"TensorRT {wanted.version} quantizes weights from floats: constant → "
                    f"QuantizeLinear → DequantizeLinear, got an {kind} constant",
                )


def rule_6_zero_points(file: ParsedFile, wanted: Features) -> Iterator[Violation]:
    """R6: quantization is symmetric: zero points are INT8 (INT4), zero, as many as scales."""
    for node in file.nodes("QuantizeLinear", "DequantizeLinear"):
        zero = node.input[2] if len(node.input) > 2 else ""
        if not zero:
            if wanted.zero_point_needed:
                yield Violation(
                    "R6", place(node), f"TensorRT {wanted.version} needs a zero point of zeros"
                )
            elif node.op_type == "QuantizeLinear" and attribute(node, "output_dtype") in (None, 0):
                yield Violation(
                    "R6",
                    place(node),
                    "without zero point or output_dtype ONNX means UINT8; say INT8",
                )
            continue
        kind = file.dtype(zero)
        if kind in (_T.UINT8, _T.UINT4, _T.UINT16):
            yield Violation("R6", place(node), f"quantized types are signed, got {type_name(kind)}")
        values = file.constant(zero)
        if values is None:
            if not file.is_constant(zero):
                yield Violation("R6", place(node), "the zero point must be a constant of zeros")
        elif np.asarray(values, np.float64).any():
            yield Violation("R6", place(node), "zero points must all be 0")
        if file.shape(zero) != file.shape(node.input[1]) and (
            _volume(file, zero) != _volume(file, node.input[1])
        ):
            yield Violation("R6", place(node), "there must be as many zero points as scales")


def rule_7_scales(file: ParsedFile, wanted: Features) -> Iterator[Violation]:
    """R7: scales are constants and positive; before TensorRT 10 they are FLOAT."""
    for node in file.nodes("QuantizeLinear", "DequantizeLinear"):
        scale = node.input[1]
        if not file.is_constant(scale):
            yield Violation(
                "R7",
                place(node),
                f"the scale {scale} is computed at run time; TensorRT quantizes with constant ones",
            )
            continue
        kind = file.dtype(scale)
        if not wanted.half_scales and kind != _T.FLOAT:
            yield Violation(
                "R7",
                place(node),
                f"TensorRT {wanted.version} reads FLOAT scales, got {type_name(kind)}",
            )
        values = file.constant(scale)
        if values is not None and not (np.asarray(values, np.float64) > 0).all():
            yield Violation("R7", place(node), "scales must be positive")


def rule_8_granularity(file: ParsedFile, wanted: Features) -> Iterator[Violation]:
    """R8: activations have one scale; weights one, or one an output channel along `axis`."""
    for node in file.nodes("QuantizeLinear", "DequantizeLinear"):
        scales = _volume(file, node.input[1])
        if scales == 1 or _is_blocked(file, node):
            continue
        data = _source(file, node)
        if not file.is_constant(data):
            yield Violation(
                "R8", place(node), f"activations must have one scale a tensor, got {_text(scales)}"
            )
            continue
        shape = file.shape(node.input[0]) or file.shape(data)
        axis = attribute(node, "axis")
        index = 1 if axis is None else int(str(axis))
        if shape and not -len(shape) <= index < len(shape):
            yield Violation("R8", place(node), f"axis {index} is none of {len(shape)} dimensions")
        elif shape and shape[index] != scales:
            yield Violation(
                "R8",
                place(node),
                f"there must be one scale for each of {_text(shape[index])} channels of axis "
                f"{index}, got {_text(scales)}",
            )


def rule_9_blocks(file: ParsedFile, wanted: Features) -> Iterator[Violation]:
    """R9: blocks are for INT4 weights (TensorRT 10), of 64 or 128 along one of two dimensions."""
    for node in file.nodes("QuantizeLinear", "DequantizeLinear"):
        if not _is_blocked(file, node):
            continue
        where = place(node)
        if not wanted.blocks:
            yield Violation(
                "R9", where, f"blocked quantization needs TensorRT 10, got {wanted.version}"
            )
            continue
        kind = file.dtype(node.input[0] if node.op_type == "DequantizeLinear" else node.output[0])
        if kind != _T.INT4:
            yield Violation(
                "R9", where, f"blocked quantization of integers is for INT4, got {type_name(kind)}"
            )
        size = attribute(node, "block_size")
        if size not in BLOCKS:
            yield Violation(
                "R9", where, f"blocks must be {' or '.join(map(str, BLOCKS))}, got {size}"
            )
        shape = file.shape(node.input[0])
        if shape is not None and len(shape) != 2:
            yield Violation("R9", where, f"blocked weights have 2 dimensions, got {len(shape)}")


def rule_10_int4(file: ParsedFile, wanted: Features) -> Iterator[Violation]:
    """R10: INT4 is weight-only: a constant of TensorRT 10 with an even last dimension, and its
    DequantizeLinear feeds a product."""
    for node in file.nodes("QuantizeLinear"):
        if attribute(node, "output_dtype") == _T.INT4 and not file.is_constant(node.input[0]):
            yield Violation("R10", place(node), "activations are not quantized to INT4")
    for node in file.nodes("DequantizeLinear"):
        tensor = file.initializers.get(node.input[0])
        if tensor is None or tensor.data_type != _T.INT4:
            continue
        if not wanted.blocks:
            yield Violation("R10", place(node), f"INT4 needs TensorRT 10, got {wanted.version}")
        if tensor.dims and tensor.dims[-1] % 2:
            yield Violation(
                "R10", place(node), f"the last dimension must be even, got {tensor.dims[-1]}"
            )
        readers = _readers_through(file, node.output[0])
        if not readers <= {"MatMul", "Gemm"}:
            yield Violation(
                "R10",
                place(node),
                f"INT4 weights feed MatMul or Gemm, got {', '.join(sorted(readers))}",
            )


def rule_11_dimensions(file: ParsedFile, wanted: Features) -> Iterator[Violation]:
    """R11: no tensor has more than 8 dimensions."""
    for node in file.model.graph.node:
        for name in node.output:
            shape = file.shape(name)
            if shape is not None and len(shape) > _MOST_DIMENSIONS:
                yield Violation(
                    "R11", place(node), f"tensors have 8 dimensions at most, got {len(shape)}"
                )


def rule_12_constant_operands(file: ParsedFile, wanted: Features) -> Iterator[Violation]:
    """R12: axes of Unsqueeze, Squeeze and the reductions are constants."""
    for node in file.nodes():
        takes_axes = node.op_type in ("Unsqueeze", "Squeeze") or node.op_type.startswith("Reduce")
        if (
            takes_axes
            and len(node.input) > 1
            and node.input[1]
            and not file.is_constant(node.input[1])
        ):
            yield Violation("R12", place(node), f"the axes of {node.op_type} must be constant")


def rule_13_outputs(file: ParsedFile, wanted: Features) -> Iterator[Violation]:
    """R13: of LayerNormalization, MaxPool and Dropout only the first output is read."""
    outputs = {value.name for value in file.model.graph.output}
    for node in file.nodes("LayerNormalization", "MaxPool", "Dropout"):
        for name in node.output[1:]:
            if name and (name in file.readers or name in outputs):
                yield Violation(
                    "R13", place(node), f"only the first output of {node.op_type} is supported"
                )


RULES: tuple[Rule, ...] = (
    rule_1_opset,
    rule_2_operators,
    rule_3_plugins,
    rule_4_types,
    rule_5_int8_constants,
    rule_6_zero_points,
    rule_7_scales,
    rule_8_granularity,
    rule_9_blocks,
    rule_10_int4,
    rule_11_dimensions,
    rule_12_constant_operands,
    rule_13_outputs,
)


def _volume(file: ParsedFile, name: str) -> int | None:
    """How many values there are; None where that is dynamic or unknown."""
    shape = file.shape(name)
    if shape is None or any(size is None for size in shape):
        return None
    return int(np.prod([size or 0 for size in shape], dtype=np.int64))


def _is_blocked(file: ParsedFile, node: NodeProto) -> bool:
    return bool(attribute(node, "block_size"))


def _source(file: ParsedFile, node: NodeProto) -> str:
    """What is quantized: the input of QuantizeLinear, also of the one before DequantizeLinear."""
    name = node.input[0]
    maker = file.makers.get(name)
    if (
        node.op_type == "DequantizeLinear"
        and maker is not None
        and maker.op_type == "QuantizeLinear"
    ):
        return maker.input[0]
    return name


def _readers_through(file: ParsedFile, name: str) -> set[str]:
    """The operators that read a value, seen through Cast and Transpose."""
    found: set[str] = set()
    for node in file.readers.get(name, []):
        if node.op_type in ("Cast", "Transpose"):
            found |= _readers_through(file, node.output[0])
        else:
            found.add(node.op_type)
    return found


def _text(count: int | None) -> str:
    return "a dynamic number" if count is None else str(count)
