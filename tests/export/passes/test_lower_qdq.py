"""The `qdq` lowering of single linears: integers and scales to the bit, at DiT-XL's widths too."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qdit.calibrate.plan import LinearSpec
from qdit.calibrate.quantizers import (
    QuantizedWeight,
    quantize_activation,
    quantize_weight_nearest,
)
from qdit.calibrate.schemes import LayerScheme
from qdit.calibrate.simulate import QuantizedLinear
from qdit.export.contents import LinearContents
from qdit.export.opsets import ComputeDtype
from qdit.export.passes.lower_qdq import LowerQdqPass

_OUT = 48


def _contents(
    scheme: LayerScheme, k: int, name: str = "layer", input_name: str = "layer.input"
) -> LinearContents:
    generator = torch.Generator().manual_seed(k)
    weight = torch.randn(_OUT, k, generator=generator) / k**0.5
    quantized = quantize_weight_nearest(weight, scheme) if scheme.quantizes_weights else None
    bias = torch.randn(_OUT, generator=generator)
    return LinearContents(
        LinearSpec(name, "mlp_in", 0, k, _OUT, True, input_name),
        scheme,
        bias,
        quantized=partial(_some, quantized),
        weight=lambda: weight,
    )


def _some(quantized: QuantizedWeight | None) -> QuantizedWeight:
    assert quantized is not None
    return quantized


def _abstract(k: int, layers: tuple[str, ...] = ("layer",), dtype: str = "float") -> ir.Model:
    nodes = " ".join(
        f'y{i} = qdit.GroupQuantLinear<layer = "{name}">(r)' for i, name in enumerate(layers)
    )
    outputs = ", ".join(f"{dtype}[batch, t, {_OUT}] y{i}" for i in range(len(layers)))
    model = ir.from_proto(
        onnx.parser.parse_model(
            f'<ir_version: 10, opset_import: ["" : 21, "qdit" : 1]>'
            f"g ({dtype}[batch, t, {k}] x) => ({outputs}) {{ r = Identity(x) {nodes} }}"
        )
    )
    identity = model.graph[0]
    identity.outputs[0].shape = model.graph.inputs[0].shape
    identity.outputs[0].type = model.graph.inputs[0].type
    return model


def _lower(
    contents: list[LinearContents], dtype: ComputeDtype = "float32", exposed: bool = True
) -> ir.Model:
    names = tuple(entry.spec.name for entry in contents)
    onnx_dtype = {"float32": "float", "float16": "float16"}[dtype]
    model = _abstract(contents[0].spec.in_features, names, onnx_dtype)
    LowerQdqPass({entry.spec.name: entry for entry in contents}, dtype)(model)
    ir.passes.common.RemoveUnusedOpsetsPass()(model)
    if exposed:
        for node in model.graph:
            if node.op_type in ("QuantizeLinear", "Clip", "Cast", "Max"):
                model.graph.outputs.extend(node.outputs)
    return model


def _run(model: ir.Model, x: np.ndarray, level: int | None = None) -> dict[str, np.ndarray]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if level == 0:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"x": x}), strict=True))


def _activations(k: int, dtype: type = np.float32) -> np.ndarray:
    """Normal values, and tokens that are all zero, all of one sign, tiny, and huge."""
    x = np.random.default_rng(0).normal(size=(2, 6, k))
    x[0, 0] = 0
    x[0, 1] = np.abs(x[0, 1]) + 3
    x[0, 2] = -np.abs(x[0, 2]) - 3
    x[0, 3] *= 1e-9
    x[0, 4] *= 1e4
    return x.astype(dtype)


ACTIVATIONS = [
    (bits, symmetric, group, k)
    for bits in (4, 6, 8)
    for symmetric in (True, False)
    for group, k in ((32, 256), (96, 1152), (288, 1152), (1152, 1152), ("token", 1152))
]


class TestActivations:
    @pytest.mark.parametrize(("bits", "symmetric", "group", "k"), ACTIVATIONS)
    def test_integers_scales_and_zero_points_equal_the_simulation_to_the_bit(
        self, bits: int, symmetric: bool, group: int | str, k: int
    ) -> None:
        scheme = LayerScheme(8, bits, "channel", group, True, symmetric)  # type: ignore[arg-type]
        x = _activations(k)
        values = _run(_lower([_contents(scheme, k)]), x)
        integers, scale, zero_point = quantize_activation(torch.from_numpy(x), scheme)
        prefix = f"layer.input/a{bits}_{group}" + ("" if symmetric else "_asym")
        clipped = not symmetric and bits < 8
        made = values[f"{prefix}/clipped" if clipped else f"{prefix}/quantized"]
        np.testing.assert_array_equal(made, integers.reshape(x.shape).numpy())
        np.testing.assert_array_equal(values[f"{prefix}/scale"], scale.squeeze(-1).numpy())
        if not symmetric:
            made_zero_point = values[f"{prefix}/zero_point"]
            np.testing.assert_array_equal(made_zero_point, zero_point.squeeze(-1).numpy())

    @settings(max_examples=200, deadline=None)
    @given(
        group=st.lists(
            st.floats(-1e6, 1e6, width=32).filter(lambda v: abs(v) > 1e-30 or v == 0),
            min_size=32,
            max_size=32,
        ),
        bits=st.sampled_from([4, 6, 8]),
    )
    def test_symmetric_integers_need_no_clip(self, group: list[float], bits: int) -> None:
        """Case 1 of `emit_fake_quantization`: nothing rounds past 2^(b-1)-1."""
        x = torch.tensor([group], dtype=torch.float32)
        top = 2 ** (bits - 1) - 1
        scale = (x.abs().amax() / top).clamp(min=2.0**-24)
        assert torch.round(x / scale).abs().max() <= top

    def test_asymmetric_integers_do(self) -> None:
        """Case 3: -7.5 and 7.5 steps both round to 8, which makes 16 of 15."""
        scheme = LayerScheme(8, 4, "channel", 32, True, False)
        x = np.zeros((1, 1, 32), np.float32)
        x[..., 0], x[..., 1] = -7.5, 7.5
        values = _run(_lower([_contents(scheme, 32)]), x)
        prefix = "layer.input/a4_32_asym"
        assert values[f"{prefix}/quantized"].max() == 16
        assert values[f"{prefix}/clipped"].max() == 15

    def test_float16_is_quantized_in_float32(self) -> None:
        """Case 5."""
        scheme = LayerScheme(8, 8, "channel", 32, True, False)
        x = _activations(256, np.float16)
        values = _run(_lower([_contents(scheme, 256)], "float16"), x)
        integers, scale, _ = quantize_activation(torch.from_numpy(x), scheme)
        made = values["layer.input/a8_32_asym/quantized"]
        np.testing.assert_array_equal(made, integers.reshape(x.shape).numpy())
        made_scale = values["layer.input/a8_32_asym/scale"]
        assert made_scale.dtype == np.float32
        np.testing.assert_array_equal(made_scale, scale.squeeze(-1).numpy())


WEIGHTS = [
    (bits, symmetric, group, k)
    for bits in (2, 3, 4, 6, 8)
    for symmetric in (True, False)
    for group, k in ((32, 256), (192, 1152), (1152, 1152), ("channel", 288))
]


class TestWeights:
    @pytest.mark.parametrize(("bits", "symmetric", "group", "k"), WEIGHTS)
    @pytest.mark.parametrize("activation_bits", [8, 16])
    @pytest.mark.parametrize("level", [None, 0], ids=["optimized", "node by node"])
    def test_products_equal_the_simulation(
        self,
        bits: int,
        symmetric: bool,
        group: int | str,
        k: int,
        activation_bits: int,
        level: int | None,
    ) -> None:
        scheme = LayerScheme(bits, activation_bits, group, "token", symmetric, False)  # type: ignore[arg-type]
        contents = _contents(scheme, k)
        x = _activations(k)
        made = _run(_lower([contents], exposed=False), x, level)["layer.output"]
        simulated = QuantizedLinear(scheme, contents.quantized(), contents.bias)
        with torch.inference_mode():
            wanted = simulated(torch.from_numpy(x)).numpy()
        assert np.linalg.norm(made - wanted) <= 1e-6 * np.linalg.norm(wanted)

    @pytest.mark.parametrize(
        ("bits", "symmetric", "dtype"),
        [(2, True, "INT4"), (3, False, "UINT4"), (4, True, "INT4"), (6, True, "INT8"),
         (8, False, "UINT8")],
    )  # fmt: skip
    def test_are_stored_in_the_smallest_type(self, bits: int, symmetric: bool, dtype: str) -> None:
        scheme = LayerScheme(bits, 16, 32, weight_symmetric=symmetric)
        model = _lower([_contents(scheme, 64)])
        weight = model.graph.initializers["layer.weight"]
        assert (weight.dtype, list(weight.shape)) == (ir.DataType[dtype], [64, _OUT])
        assert ("layer.weight_zero_point" in model.graph.initializers) == (not symmetric)

    @pytest.mark.parametrize("group", [32, 128, 144, 1152], ids=str)
    @pytest.mark.parametrize("bits", [2, 3, 4], ids=lambda bits: f"w{bits}")
    def test_integer_scales_are_written_as_the_groups_factors(self, bits: int, group: int) -> None:
        """Case 5 of `emit_weight`: s·m as float32, and the matrix that an int8 weight gives."""
        scheme = LayerScheme(bits, 16, group, scale_format="integer")
        contents = replace(_contents(scheme, 1152), bias=None)
        quantized = contents.quantized()
        model = _lower([contents])
        scale = model.graph.initializers["layer.weight_scale"].const_value
        assert scale is not None
        np.testing.assert_array_equal(scale.numpy(), quantized.scale.numpy().T)
        identity = np.eye(1152, dtype=np.float32)[None]
        made = _run(model, identity)["layer.output"][0]
        int8 = quantized.int8_values() * quantized.channel_scale
        np.testing.assert_array_equal(made, int8.numpy().T)

    def test_unquantized_weights_are_a_plain_product(self) -> None:
        """Case 5 of the pass."""
        scheme = LayerScheme(16, 16)
        contents = _contents(scheme, 64)
        model = _lower([contents])
        assert [node.op_type for node in model.graph] == ["Identity", "MatMul", "Add"]
        x = _activations(64)
        made = _run(model, x)["layer.output"]
        assert contents.bias is not None
        wanted = x @ contents.weight().numpy().T + contents.bias.numpy()
        assert np.linalg.norm(made - wanted) <= 1e-6 * np.linalg.norm(wanted)

    def test_without_a_bias_the_product_is_the_output(self) -> None:
        """Case 6."""
        contents = replace(_contents(LayerScheme(4, 16), 128), bias=None)
        model = _lower([contents])
        assert model.graph.outputs[0].producer().op_type == "MatMul"
        assert json.loads(model.metadata_props["qdit.linears"])["layer"]["output"] == "layer.output"

    @pytest.mark.parametrize(
        ("scheme", "dtype"),
        [
            (LayerScheme(4, 16, 32), "FLOAT16"),
            (LayerScheme(4, 16, 32, scale_dtype="float32"), "FLOAT"),
            (LayerScheme(4, 16, 32, scale_format="integer"), "FLOAT"),
        ],
        ids=["float16", "float32", "integer"],
    )
    def test_float16_weights_are_rounded_once(self, scheme: LayerScheme, dtype: str) -> None:
        contents = replace(_contents(scheme, 64), bias=None)
        model = _lower([contents], "float16")
        (dequantize,) = (n for n in model.graph if n.op_type == "DequantizeLinear")
        assert dequantize.inputs[1].dtype == ir.DataType[dtype]
        identity = np.eye(64, dtype=np.float16)[None]
        made = _run(model, identity)["layer.output"][0]
        wanted = contents.quantized().dequantize().half().numpy().T
        np.testing.assert_array_equal(made, wanted)


class TestSharing:
    def test_equal_activation_schemes_on_one_value_are_quantized_once(self) -> None:
        """Case 2: like q, k and v, whatever their weights are."""
        schemes = [LayerScheme(4), LayerScheme(8), LayerScheme(3, weight_group=64)]
        contents = [
            _contents(scheme, 256, f"to_{letter}", "attn.input")
            for scheme, letter in zip(schemes, "qkv", strict=True)
        ]
        kinds = [node.op_type for node in _lower(contents).graph]
        assert kinds.count("QuantizeLinear") == kinds.count("ReduceMax") == 1
        assert kinds.count("MatMul") == 3

    def test_different_ones_are_not(self) -> None:
        schemes = [LayerScheme(), LayerScheme(activation_group=64), LayerScheme(activation_bits=4),
                   LayerScheme(activation_symmetric=False), LayerScheme(4, 16)]  # fmt: skip
        contents = [_contents(s, 256, f"layer{i}", "input") for i, s in enumerate(schemes)]
        model = _lower(contents)
        kinds = [node.op_type for node in model.graph]
        assert kinds.count("QuantizeLinear") == 4
        x = _activations(256)
        values = _run(model, x)
        for i, entry in enumerate(contents):
            simulated = QuantizedLinear(entry.scheme, entry.quantized(), entry.bias)
            wanted = simulated(torch.from_numpy(x)).detach().numpy()
            made = values[f"layer{i}.output"]
            assert np.linalg.norm(made - wanted) <= 1e-6 * np.linalg.norm(wanted)


def test_nothing_is_loaded_before_it_is_written() -> None:
    def explode() -> QuantizedWeight:
        raise AssertionError("the lowering read a weight")

    _lower([replace(_contents(LayerScheme(), 128), quantized=explode)])


def test_keeps_a_model_without_linears() -> None:
    text = (
        '<ir_version: 10, opset_import: ["" : 21]> g (float[2] x) => (float[2] y) { y = Relu(x) }'
    )
    model = ir.from_proto(onnx.parser.parse_model(text))
    assert not LowerQdqPass({}, "float32")(model).modified
    assert [node.op_type for node in model.graph] == ["Relu"]
