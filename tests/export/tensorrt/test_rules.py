"""Each rule is broken by a file made for it, and kept by every file that qdit writes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from qdit import cli
from qdit.calibrate.schemes import LayerScheme
from qdit.errors import ArtifactError, InputError
from qdit.export.tensorrt.lower_int4 import LowerInt4Pass
from qdit.export.tensorrt.lower_int8 import LowerInt8Pass
from qdit.export.tensorrt.operators import supported_operators
from qdit.export.tensorrt.rules import RULES, check_file
from qdit.export.tensorrt.versions import TensorRtVersion

from .conftest import NEW, OLD, Traced, checkpoint_of
from .test_lower_int8 import BY_CHANNEL, static_scales

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def inspect(*arguments: str) -> int:
    """`qdit-inspect` in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["qdit-inspect", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.inspect_command()
    return int(stopped.value.code or 0)


def constant(name: str, values: object, dtype: object = np.float32) -> TensorProto:
    return numpy_helper.from_array(np.array(values, dtype), name)


def int4(name: str, dims: list[int]) -> TensorProto:
    return TensorProto(
        name=name, data_type=TensorProto.INT4, dims=dims, raw_data=bytes(int(np.prod(dims)) // 2)
    )


def model_of(
    text: str, *constants: TensorProto, opset: int = 17, shape: str = "2, 4"
) -> onnx.ModelProto:
    """A graph over x float[shape], from ONNX's textual form of its nodes."""
    head = f'<ir_version: 10, opset_import: ["" : {opset}, "qdit" : 1, "other" : 1]>'
    body, _, functions = text.partition("|")
    model = onnx.parser.parse_model(f"{head} g (float[{shape}] x) => (y) {{ {body} }} {functions}")
    model.graph.initializer.extend(constants)
    for number, node in enumerate(model.graph.node):
        node.name = f"node{number}"
    return model


PLUGIN = (
    'y = qdit.Plugin<plugin_namespace = "{}", plugin_version = "{}", aot = {}>(x)'
    '| <domain: "qdit", opset_import: ["" : 21]> Plugin (x) => (y) {{ y = Relu(x) }}'
)
SCALE, ZERO = constant("s", 0.5), constant("z", 0, np.int8)
QUANTIZED = "q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)"
BLOCKED = "w = DequantizeLinear<axis = 0, block_size = {}>(i, s) y = MatMul(x, w)"

# (rule, version, the line's text, the file)
BROKEN: dict[str, tuple[str, str, str, Callable[[], onnx.ModelProto]]] = {
    "newer opset": (
        "R1", "8.6", "opset must be 9 … 17, got 21", lambda: model_of("y = Relu(x)", opset=21)
    ),
    "older opset": (
        "R1", "11", "opset must be 9 … 24, got 8", lambda: model_of("y = Relu(x)", opset=8)
    ),
    "no importer": ("R2", "8.6", "no importer for Det", lambda: model_of("y = Det(x)")),
    "another domain": (
        "R2", "11", "no importer, function or plugin for other::Odd",
        lambda: model_of("y = other.Odd(x)"),
    ),
    "a function of old": (
        "R2", "8.6", "local functions need TensorRT 10, got 8.6.0",
        lambda: model_of(
            'y = qdit.Own(x) | <domain: "qdit", opset_import: ["" : 17]> Own (x) => (y) '
            "{ y = Relu(x) }"
        ),
    ),
    "an operator in a function": (
        "R2", "10", "node0: no importer for Det|in Own: no importer for Det",
        lambda: model_of(
            'y = qdit.Own(x) | <domain: "qdit", opset_import: ["" : 17]> Own (x) => (y) '
            "{ y = Det(x) }"
        ),
    ),
    "a plugin too early": (
        "R3", "10.8", "ahead-of-time plugins need TensorRT 10.9",
        lambda: model_of(PLUGIN.format("qdit", "1", 1)),
    ),
    "a reserved namespace": (
        "R3", "11", "plugin_namespace must not be empty, trt",
        lambda: model_of(PLUGIN.format("trt", "1", 1)),
    ),
    "a dot in a namespace": (
        "R3", "11", "nor hold a dot, got 'a.b'", lambda: model_of(PLUGIN.format("a.b", "1", 1))
    ),
    "a plugin version": (
        "R3", "11", "plugin_version must be '1', got '2'",
        lambda: model_of(PLUGIN.format("qdit", "2", 1)),
    ),
    "not ahead of time": (
        "R3", "11", "aot must be 1, got 0", lambda: model_of(PLUGIN.format("qdit", "1", 0))
    ),
    "a type of constants": (
        "R4", "8.6", "no constants of BFLOAT16",
        lambda: model_of(
            "c = Cast<to = 1>(b) y = Add(x, c)",
            TensorProto(name="b", data_type=TensorProto.BFLOAT16, dims=[1], raw_data=b"\0\0"),
        ),
    ),
    "an INT8 constant into Cast": (
        "R5", "11", "an INT8 constant is read by Cast",
        lambda: model_of("c = Cast<to = 1>(i) y = Add(x, c)", constant("i", [1], np.int8)),
    ),
    "an INT8 weight of old": (
        "R5", "8.6", "quantizes weights from floats",
        lambda: model_of(
            "w = DequantizeLinear(i, s, z) y = MatMul(x, w)",
            constant("i", np.ones((4, 4)), np.int8), SCALE, ZERO,
        ),
    ),
    "no zero point": (
        "R6", "8.6", "needs a zero point of zeros",
        lambda: model_of("q = QuantizeLinear(x, s) y = DequantizeLinear(q, s)", SCALE),
    ),
    "UINT8 by default": (
        "R6", "11", "ONNX means UINT8",
        lambda: model_of("q = QuantizeLinear(x, s) y = DequantizeLinear(q, s)", SCALE, opset=21),
    ),
    "an unsigned zero point": (
        "R6", "11", "signed, got UINT8",
        lambda: model_of(QUANTIZED, SCALE, constant("z", 0, np.uint8)),
    ),
    "a zero point of 3": (
        "R6", "11", "zero points must all be 0",
        lambda: model_of(QUANTIZED, SCALE, constant("z", 3, np.int8)),
    ),
    "zero points of another number": (
        "R6", "11", "as many zero points as scales",
        lambda: model_of(QUANTIZED, SCALE, constant("z", [0, 0], np.int8)),
    ),
    "a dynamic scale": (
        "R7", "11", "computed at run time",
        lambda: model_of(
            "s = ReduceMax<keepdims = 0>(x) " + QUANTIZED, ZERO
        ),
    ),
    "a scale of 0": (
        "R7", "11", "scales must be positive",
        lambda: model_of(QUANTIZED, constant("s", 0.0), ZERO),
    ),
    "a float16 scale of old": (
        "R7", "8.6", "reads FLOAT scales, got FLOAT16",
        lambda: model_of(QUANTIZED, constant("s", 0.5, np.float16), ZERO),
    ),
    "activations by channel": (
        "R8", "11", "activations must have one scale a tensor, got 4",
        lambda: model_of(
            QUANTIZED, constant("s", [1.0] * 4), constant("z", [0] * 4, np.int8)
        ),
    ),
    "weights of another number": (
        "R8", "11", "one scale for each of 6 channels of axis 1, got 4",
        lambda: model_of(
            "w = DequantizeLinear<axis = 1>(i, s, z) y = MatMul(x, w)",
            constant("i", np.ones((4, 6)), np.int8),
            constant("s", [1.0] * 4), constant("z", [0] * 4, np.int8),
        ),
    ),
    "an axis that is none": (
        "R8", "11", "axis 2 is none of 2 dimensions",
        lambda: model_of(
            "w = DequantizeLinear<axis = 2>(i, s, z) y = MatMul(x, w)",
            constant("i", np.ones((4, 6)), np.int8),
            constant("s", [1.0] * 4), constant("z", [0] * 4, np.int8),
        ),
    ),
    "blocks of old": (
        "R9", "8.6", "blocked quantization needs TensorRT 10",
        lambda: model_of(
            BLOCKED.format(64), int4("i", [128, 4]), constant("s", np.ones((2, 4))),
            opset=21, shape="2, 128",
        ),
    ),
    "blocks of 32": (
        "R9", "11", "blocks must be 128 or 64, got 32",
        lambda: model_of(
            BLOCKED.format(32), int4("i", [128, 4]), constant("s", np.ones((4, 4))),
            opset=21, shape="2, 128",
        ),
    ),
    "blocks of INT8": (
        "R9", "11", "for INT4, got INT8",
        lambda: model_of(
            BLOCKED.format(64), constant("i", np.ones((128, 4)), np.int8),
            constant("s", np.ones((2, 4))), opset=21, shape="2, 128",
        ),
    ),
    "blocks of three dimensions": (
        "R9", "11", "blocked weights have 2 dimensions, got 3",
        lambda: model_of(
            "w = DequantizeLinear<axis = 1, block_size = 64>(i, s) y = MatMul(x, w)",
            int4("i", [1, 128, 4]), constant("s", np.ones((1, 2, 4))), opset=21, shape="1, 2, 128",
        ),
    ),
    "INT4 activations": (
        "R10", "11", "activations are not quantized to INT4",
        lambda: model_of(
            "q = QuantizeLinear<output_dtype = 22>(x, s) y = DequantizeLinear(q, s)",
            SCALE, opset=21,
        ),
    ),
    "INT4 of old": (
        "R10", "8.6", "INT4 needs TensorRT 10",
        lambda: model_of(
            BLOCKED.format(64), int4("i", [128, 4]), constant("s", np.ones((2, 4))),
            opset=21, shape="2, 128",
        ),
    ),
    "an odd last dimension": (
        "R10", "11", "must be even, got 3",
        lambda: model_of(
            BLOCKED.format(64), int4("i", [128, 3]), constant("s", np.ones((2, 3))),
            opset=21, shape="2, 128",
        ),
    ),
    "INT4 into Add": (
        "R10", "11", "feed MatMul or Gemm, got Add",
        lambda: model_of(
            "w = DequantizeLinear<axis = 0, block_size = 64>(i, s) y = Add(x, w)",
            int4("i", [128, 4]), constant("s", np.ones((2, 4))), opset=21, shape="128, 4",
        ),
    ),
    "nine dimensions": (
        "R11", "11", "8 dimensions at most, got 9",
        lambda: model_of(
            "r = Reshape(x, t) y = Relu(r)", constant("t", [1] * 7 + [2, 4], np.int64)
        ),
    ),
    "axes at run time": (
        "R12", "11", "axes of Unsqueeze must be constant",
        lambda: model_of("n = Size(x) a = Reshape(n, t) y = Unsqueeze(x, a)",
                         constant("t", [1], np.int64)),
    ),
    "a second output": (
        "R13", "11", "only the first output of LayerNormalization",
        lambda: model_of("a, b = LayerNormalization<axis = -1>(x, g) y = Add(a, b)",
                         constant("g", [1.0] * 4)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_breaks_a_rule(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rule, version, text, make = BROKEN[name]
    path = tmp_path / "broken.onnx"
    onnx.save(make(), path)
    lines = [str(violation) for violation in check_file(path, version)]
    alternatives = text.split("|")
    assert any(
        line.startswith(f"{rule} ") and any(wanted in line for wanted in alternatives)
        for line in lines
    ), lines
    assert inspect(str(path), "--tensorrt", version) == 1
    assert capsys.readouterr().out.splitlines() == lines


def test_every_rule_has_a_file_that_breaks_it() -> None:
    assert {rule for rule, *_ in BROKEN.values()} == {f"R{i + 1}" for i in range(len(RULES))}
    assert [rule.__doc__.split(":")[0] for rule in RULES if rule.__doc__] == [
        f"R{i + 1}" for i in range(len(RULES))
    ]


KEPT = {
    "activations by tensor": ("8.6", lambda: model_of(QUANTIZED, SCALE, ZERO)),
    "weights by channel": (
        "8.6",
        lambda: model_of(
            "q = QuantizeLinear<axis = 1>(f, s, z) w = DequantizeLinear<axis = 1>(q, s, z) "
            "y = MatMul(x, w)",
            constant("f", np.ones((4, 6))),
            constant("s", [1.0] * 6),
            constant("z", [0] * 6, np.int8),
        ),
    ),
    "INT4 in blocks": (
        "10",
        lambda: model_of(
            BLOCKED.format(128),
            int4("i", [128, 4]),
            constant("s", np.ones((1, 4))),
            opset=21,
            shape="2, 128",
        ),
    ),
    "a plugin": ("10.9", lambda: model_of(PLUGIN.format("qdit", "1", 1))),
    "a function": (
        "10",
        lambda: model_of(
            'y = qdit.Own(x) | <domain: "qdit", opset_import: ["" : 17]> Own (x) => (y) '
            "{ y = Relu(x) }"
        ),
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_file_that_keeps_them(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version, make = KEPT[name]
    path = tmp_path / "kept.onnx"
    onnx.save(make(), path)
    assert check_file(path, version) == []
    assert inspect(str(path), "--tensorrt", version) == 0
    assert "every rule of TensorRT" in capsys.readouterr().out


class TestWrittenFiles:
    @pytest.mark.parametrize(("version", "wanted"), [("8.6", OLD), ("10.15", NEW), ("11", NEW)])
    def test_int8(self, traced: Traced, version: str, wanted: object, tmp_path: Path) -> None:
        checkpoint, contents = checkpoint_of(traced.model, BY_CHANNEL)
        dtype = "float32" if version == "8.6" else "float16"
        lowering = LowerInt8Pass(contents, static_scales(checkpoint), dtype, wanted)  # type: ignore[arg-type]
        path = traced.write(contents, lowering, tmp_path / "m.onnx", wanted, checkpoint).path  # type: ignore[arg-type]
        assert check_file(path, version) == []

    def test_int4(self, traced: Traced, tmp_path: Path) -> None:
        checkpoint, contents = checkpoint_of(traced.model, LayerScheme(4, 16, 64))
        lowering = LowerInt4Pass(contents, "float16")
        path = traced.write(contents, lowering, tmp_path / "m.onnx", NEW, checkpoint).path
        assert check_file(path, "11") == []
        rules = {violation.rule for violation in check_file(path, "8.6")}
        assert {"R1", "R9", "R10"} <= rules

    def test_the_reference_file_is_for_other_runtimes(self, traced: Traced, tmp_path: Path) -> None:
        """Dynamic scales and blocked INT8 are what TensorRT cannot do (platform facts)."""
        from qdit.export.qdq import export_qdq

        checkpoint, _ = checkpoint_of(traced.model, LayerScheme(4, 8, 64, 64))
        path = export_qdq(checkpoint, tmp_path / "model.onnx").path
        rules = {violation.rule for violation in check_file(path, "11")}
        assert {"R7", "R9"} <= rules


def test_json_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.onnx"
    onnx.save(model_of("y = Det(x)"), path)
    assert inspect(str(path), "--tensorrt", "11", "--json") == 1
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry == {"rule": "R2", "where": "node0", "text": "no importer for Det"}


def test_what_is_no_file_or_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        check_file(tmp_path / "none.onnx", "11")
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="not a readable ONNX file"):
        check_file(path, "11")
    with pytest.raises(InputError, match="must look like"):
        check_file(path, "new")


def test_operators_only_grow() -> None:
    old, ten, newest = (supported_operators(TensorRtVersion.parse(v)) for v in ("8.6", "10", "11"))
    assert old < ten < newest
    assert {"LayerNormalization", "QuantizeLinear", "DequantizeLinear", "MatMul"} <= old
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    # parser extensions that ONNX dropped or never had
    assert newest - known <= {"ImageScaler", "ParametricSoftplus", "ScaledTanh"}
