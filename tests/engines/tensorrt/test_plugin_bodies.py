"""The plugins' function bodies in ONNX Runtime against the kernels' own meaning (torch, CPU)."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from qdit.calibrate.plan import LinearSpec
from qdit.calibrate.schemes import LayerScheme
from qdit.engines.kernels.layouts import scale_order
from qdit.engines.kernels.operands import QuantizedRows
from qdit.engines.kernels.product import linear
from qdit.engines.kernels.rows import quantize_rows
from qdit.engines.kernels.variants import LinearKind, QuantizeKind, WeightOnlyKind
from qdit.engines.kernels.weight_only import weight_only_linear
from qdit.engines.kernels.weights import pack_weight
from qdit.engines.tensorrt.plugin.packing import Packing, kind_from_text, kind_text
from qdit.export.contents import LinearContents
from qdit.export.opsets import LINEAR_OP, QDIT_DOMAIN
from qdit.export.tensorrt.lower_plugin import LowerPluginPass
from qdit.export.tensorrt.plugin_functions import (
    PRODUCT_INPUTS,
    ROWS_INPUTS,
    WEIGHT_ONLY_INPUTS,
    function_of,
)
from qdit.export.tensorrt.plugin_nodes import ALL_VARIANTS, RowsVariant, WeightOnlyVariant

from ..kernels.conftest import SCHEMES, make_problem, output_bound

WIDTHS = {"w4 g96": 576, "w8 g96": 576}  # not a whole number of panels: padded groups
WEIGHT_ONLY = {
    "w4 g64": LayerScheme(4, 16, 64),
    "w8 g128": LayerScheme(8, 16, 128),
    "w4 asymmetric g96": LayerScheme(4, 16, 96, weight_symmetric=False),
    "w8 asymmetric channel": LayerScheme(8, 16, "channel", weight_symmetric=False),
    "w3 integer g32": LayerScheme(3, 16, 32, scale_format="integer"),
}


def lowered(
    scheme: LayerScheme, width: int, channels: int, count: int, *, bias: bool = True
) -> tuple[onnx.ModelProto, object]:
    """A file of one linear on rows [1, count, width], and the problem that it was made of."""
    problem = make_problem(scheme, count, width, channels)
    spec = LinearSpec("layer", "mlp_in", 0, width, channels, bias, "layer.input")
    contents = LinearContents(
        spec,
        scheme,
        problem.bias if bias else None,
        quantized=lambda: problem.weight,
        weight=lambda: problem.weight.dequantize(),
    )
    model = ir.from_proto(
        onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["" : 21, "qdit" : 1]>'
            f"g (float16[batch, t, {width}] x) => (float16[batch, t, {channels}] y) "
            f'{{ r = Identity(x) y = {QDIT_DOMAIN}.{LINEAR_OP}<layer = "layer">(r) }}'
        )
    )
    identity = model.graph[0]
    identity.outputs[0].shape = model.graph.inputs[0].shape
    identity.outputs[0].type = model.graph.inputs[0].type
    LowerPluginPass({"layer": contents}, Packing(), "float16")(model)
    return ir.to_proto(model), problem


def run(
    model: onnx.ModelProto, x: torch.Tensor, extra: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for name in extra:
        copy.graph.output.append(onnx.ValueInfoProto(name=name))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(copy.SerializeToString(), options)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, {"x": x.numpy()}), strict=True))


ROWS_OUTPUTS = tuple(f"layer.input/rows.{part}" for part in ("values", "scale", "zero", "sums"))


@pytest.mark.parametrize("count", [5, 48])
@pytest.mark.parametrize("name", SCHEMES)
def test_rows_are_the_kernels_to_the_bit(name: str, count: int) -> None:
    scheme, width = SCHEMES[name], WIDTHS.get(name, 1152)
    model, problem = lowered(scheme, width, 64, count)
    made = run(model, problem.x[None], ROWS_OUTPUTS)
    wanted = quantize_rows(problem.x, QuantizeKind.of(scheme, width))
    values, scale, zero, sums = (made[name] for name in ROWS_OUTPUTS)
    assert values.shape == tuple(wanted.values.shape)
    # padding rows are undefined in the kernels' output
    np.testing.assert_array_equal(values[:, :count], wanted.values.numpy()[:, :count])
    places = scale_order(wanted.rows)[:count].numpy()
    assert scale.shape == tuple(wanted.scale.shape)
    np.testing.assert_array_equal(scale[:, places], wanted.scale.numpy()[:, places])
    if wanted.zero is None:
        assert zero.shape == (1,)
    else:
        np.testing.assert_array_equal(zero[:, places], wanted.zero.numpy()[:, places])
    if wanted.total is None:
        assert sums.shape == (1,)
    else:
        np.testing.assert_array_equal(sums[:, places], wanted.total.numpy()[:, places])


@pytest.mark.parametrize("name", SCHEMES)
def test_products_are_the_kernels(name: str) -> None:
    scheme, width, channels, count = SCHEMES[name], WIDTHS.get(name, 1152), 72, 21
    model, problem = lowered(scheme, width, channels, count)
    onnx.checker.check_model(model, full_check=True)
    made = torch.from_numpy(run(model, problem.x.reshape(3, 7, width))["layer.output"]).reshape(
        count, -1
    )
    kernel = linear(
        quantize_rows(problem.x, problem.rows_kind),
        problem.packed,
        problem.kind,
        bias=problem.bias,
    )
    expected, magnitude = problem.expected()
    bound = output_bound(expected, magnitude, torch.float16, width)
    # a float32 sum of K products, in whatever order, on top of what the kernels themselves round
    bound = bound + magnitude * width * 2.0**-24
    assert ((made.double() - expected).abs() <= bound).all()
    assert (made == kernel).float().mean() > 0.98  # the rest lies next to a tie of float16


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_weight_only_products_are_the_kernels(name: str) -> None:
    scheme, width, channels, count = WEIGHT_ONLY[name], 1152, 136, 9
    model, problem = lowered(scheme, width, channels, count)
    onnx.checker.check_model(model, full_check=True)
    made = torch.from_numpy(run(model, problem.x[None])["layer.output"][0])
    packed = pack_weight([problem.weight], scheme)
    wanted = weight_only_linear(problem.x, packed, WeightOnlyKind.of(scheme, width), problem.bias)
    assert (made == wanted).float().mean() > 0.98
    torch.testing.assert_close(made, wanted, rtol=2.0**-9, atol=2.0**-9)


def test_a_linear_without_bias(tmp_path: object) -> None:
    scheme = LayerScheme(4, 8, 64, 64)
    model, problem = lowered(scheme, 256, 64, 16, bias=False)
    made = run(model, problem.x[None])["layer.output"][0]
    wanted = linear(quantize_rows(problem.x, problem.rows_kind), problem.packed, problem.kind)
    assert (made == wanted.numpy()).mean() > 0.98


def test_the_nodes_attributes() -> None:
    model, problem = lowered(LayerScheme(4, 8, 64, 128), 256, 64, 16)
    rows, product = (node for node in model.graph.node if node.domain == QDIT_DOMAIN)
    for node in (rows, product):
        given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert given["plugin_namespace"] == b"qdit"
        assert (given["plugin_version"], given["aot"]) == (b"1", 1)
        cls = QuantizeKind if node is rows else LinearKind
        kind = problem.rows_kind if node is rows else problem.kind
        assert kind_from_text(cls, given["kind"].decode()) == kind
    assert len(rows.input) == len(ROWS_INPUTS)
    assert len(product.input) == len(PRODUCT_INPUTS)
    # what w4 g64 does not read repeats what it does
    named = dict(zip(PRODUCT_INPUTS, product.input, strict=True))
    assert named["channel_zero"] == named["channel_sum"] == named["channel_scale"]
    assert named["multiplier"] == named["w"]
    assert named["residual"] == named["gate"] == "layer.input"


def test_packed_operands_are_lazy_and_signed() -> None:
    model, problem = lowered(LayerScheme(4, 8, 64, "token", scale_format="integer"), 256, 64, 16)
    kinds = {value.name: value.data_type for value in model.graph.initializer}
    assert kinds["layer.weight"] == kinds["layer.weight_multiplier"] == onnx.TensorProto.INT8
    assert kinds["layer.weight_scale"] == onnx.TensorProto.FLOAT
    stored = {v.name: onnx.numpy_helper.to_array(v) for v in model.graph.initializer}
    packed = problem.packed
    np.testing.assert_array_equal(stored["layer.weight"].view(np.uint8), packed.values.numpy())
    np.testing.assert_array_equal(
        stored["layer.weight_multiplier"].view(np.uint8), packed.multiplier.numpy()
    )


@pytest.mark.parametrize("variant", ALL_VARIANTS, ids=lambda variant: variant.name)
def test_every_function_is_valid_onnx(variant: object) -> None:
    function = ir.to_proto(function_of(variant))  # type: ignore[arg-type]
    context = onnx.checker.C.CheckerContext()
    context.ir_version, context.opset_imports = 10, {"": 21}
    onnx.checker.check_function(function, context, onnx.checker.C.LexicalScopeContext())
    inputs = {
        RowsVariant: ROWS_INPUTS,
        WeightOnlyVariant: WEIGHT_ONLY_INPUTS,
    }.get(type(variant), PRODUCT_INPUTS)
    assert tuple(function.input) == inputs
    assert len({v.name for v in ALL_VARIANTS}) == len(ALL_VARIANTS)


def test_kinds_survive_their_text() -> None:
    for scheme in SCHEMES.values():
        kind = LinearKind.of(scheme, 1152)
        assert kind_from_text(LinearKind, kind_text(kind)) == kind
        assert "\n" not in kind_text(kind)
        assert json.loads(kind_text(kind))["width"] == 1152
    gelu = replace(QuantizeKind(1152, 128), gelu="tanh")
    assert kind_from_text(QuantizeKind, kind_text(gelu)) == gelu


def test_the_kernels_meaning_of_rows_is_the_simulation_s() -> None:
    """What the bodies are held to is itself held to `quantize_activation` (test_reference.py)."""
    rows = quantize_rows(torch.ones(16, 128).half(), QuantizeKind(128, 128))
    assert isinstance(rows, QuantizedRows)
    assert torch.equal(rows.scale, torch.full_like(rows.scale, 1 / 127))
