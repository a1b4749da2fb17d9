"""Which nodes become ours, case by case, and that they compute what they computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdit.calibrate.integers import MIN_SCALE
from qdit.engines.cpu_kernels.quantized_rows import LEAST_SCALE
from qdit.engines.cpu_kernels.swap import DOMAIN, OPERATOR, count_products, swap_products

from .conftest import Array, model_of, quantized_rows, random_linear, random_rows, session_of

_SIGNS = np.array([1, -1, -1, 1])


def _model(
    *, zero_points: bool = True, bias: bool = True, bits: int = 4, signs: Array | None = None
) -> onnx.ModelProto:
    linear = random_linear(128, 9, 32, bits, zero_points=zero_points, bias=bias)
    model = model_of(linear, "MatMulNBits", signs=signs)
    del model.opset_import[-1]
    assert [entry.domain for entry in model.opset_import] == ["", "com.microsoft"]
    return model


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_points", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("signs", [None, _SIGNS], ids=["no signs", "signs"])
def test_a_replaced_node_computes_the_same(
    signs: Array | None, bias: bool, zero_points: bool, bits: int, library: Path
) -> None:
    model = _model(zero_points=zero_points, bias=bias, bits=bits, signs=signs)
    x = random_rows(5, 128)
    (wanted,) = session_of(model, None).run(None, {"A": x})
    assert count_products(model) == swap_products(model) == 1
    assert count_products(model) == swap_products(model) == 0
    (node,) = model.graph.node
    assert (node.domain, node.op_type, list(node.output)) == (DOMAIN, OPERATOR, ["y"])
    assert {entry.name: entry.i for entry in node.attribute} == {
        "K": 128, "N": 9, "bits": bits, "block_size": 32, "first": 0, "width": 128,
    }  # fmt: skip
    assert [entry.domain for entry in model.opset_import].count(DOMAIN) == 1
    (made,) = session_of(model, library).run(None, {"A": x})
    assert np.linalg.norm(made - wanted) <= 1e-6 * np.linalg.norm(wanted)


def _attribute(name: str, value: int | None) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        node = model.graph.node[-1]
        for entry in [entry for entry in node.attribute if entry.name == name]:
            node.attribute.remove(entry)
        if value is not None:
            node.attribute.append(helper.make_attribute(name, value))

    return change


def _computed(name: str) -> Callable[[onnx.ModelProto], None]:
    """An input that the graph computes."""

    def change(model: onnx.ModelProto) -> None:
        inputs = model.graph.node[-1].input
        inputs[list(inputs).index(name)] = f"{name}/computed"
        model.graph.node.insert(0, helper.make_node("Identity", [name], [f"{name}/computed"]))

    return change


def _replaceable(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("scales", TensorProto.FLOAT, [9, 4]))


def _other_type(name: str, dtype: type) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        (constant,) = (one for one in model.graph.initializer if one.name == name)
        array = numpy_helper.to_array(constant).astype(dtype)
        constant.CopyFrom(numpy_helper.from_array(array, name))

    return change


def _group_indices(model: onnx.ModelProto) -> None:
    model.graph.node[-1].input[4] = "indices"
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(128, np.int32), "indices"))


def _domain(model: onnx.ModelProto) -> None:
    model.graph.node[-1].domain = "com.example"


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_attribute("accuracy_level", 1), id="float level"),
        pytest.param(_attribute("accuracy_level", None), id="no level"),
        pytest.param(_attribute("block_size", 16), id="block of 16"),
        pytest.param(_attribute("block_size", 96), id="block that does not divide K"),
        pytest.param(_attribute("bits", 2), id="2 bits"),
        pytest.param(_attribute("weight_prepacked", 1), id="an attribute of later versions"),
        pytest.param(_computed("B"), id="computed weights"),
        pytest.param(_computed("scales"), id="computed scales"),
        pytest.param(_computed("zero_points"), id="computed zero points"),
        pytest.param(_computed("bias"), id="computed bias"),
        pytest.param(_replaceable, id="a constant that a caller may replace"),
        pytest.param(_other_type("scales", np.float16), id="half precision"),
        pytest.param(_other_type("zero_points", np.float32), id="float zero points"),
        pytest.param(_group_indices, id="group indices"),
        pytest.param(_domain, id="another domain"),
    ],
)
def test_others_stay(change: Callable[[onnx.ModelProto], None]) -> None:
    model = _model()
    change(model)
    before = model.SerializeToString()
    assert count_products(model) == swap_products(model) == 0
    assert model.SerializeToString() == before


def test_bits_are_four_where_none_are_given() -> None:
    model = _model()
    _attribute("bits", None)(model)
    assert swap_products(model) == 1
    found = {entry.name: entry.i for entry in model.graph.node[0].attribute}
    assert found == {"K": 128, "N": 9, "bits": 4, "block_size": 32, "first": 0, "width": 128}


def _parts(signs: Array | None = None) -> onnx.ModelProto:
    """A [rows, 128] → first [rows, 9] and second [rows, 7], of its channels 0 … 31 and 32 … 127."""
    nodes, constants = quantized_rows(128, 32, signs)
    for name, start, stop, outputs in (("first", 0, 32, 9), ("second", 32, 128, 7)):
        linear = random_linear(stop - start, outputs, 32, 4, zero_points=True, bias=False)
        own = {f"{name}/{key}": array for key, array in linear.constants().items()}
        places = [f"{name}/{key}" for key in ("B", "scales", "zero_points")]
        bounds = {f"{name}/{key}": [number] for key, number in (("a", start), ("b", stop))}
        constants |= own | {key: np.array(number, np.int64) for key, number in bounds.items()}
        nodes += [
            helper.make_node("Slice", ["restored", *bounds, "last"], [f"{name}/rows"]),
            helper.make_node(
                "MatMulNBits",
                [f"{name}/rows", *places],
                [name],
                domain="com.microsoft",
                accuracy_level=4,
                **linear.sizes,
            ),
        ]
    graph = helper.make_graph(
        nodes,
        "parts",
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, ["rows", 128])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("first", "second")],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize("signs", [None, _SIGNS], ids=["no signs", "signs"])
def test_parts_of_rows_are_read_where_they_are(signs: Array | None, library: Path) -> None:
    model, x = _parts(signs), random_rows(20, 128)
    wanted = session_of(model, None).run(None, {"A": x})
    assert swap_products(model) == 2
    assert [node.op_type for node in model.graph.node] == [OPERATOR] * 2
    used = {name for node in model.graph.node for name in node.input}
    assert {one.name for one in model.graph.initializer} == used - {"A", ""}
    for made, one in zip(session_of(model, library).run(None, {"A": x}), wanted, strict=True):
        assert np.linalg.norm(made - one) <= 1e-6 * np.linalg.norm(one)


def test_what_others_need_of_the_quantization_stays(plain_library: Path) -> None:
    model, x = _parts(), random_rows(3, 128)
    model.graph.output.append(helper.make_tensor_value_info("integers", TensorProto.INT8, None))
    wanted = session_of(model, None).run(None, {"A": x})
    swap_products(model)
    left = [node.op_type for node in model.graph.node if node.op_type != OPERATOR]
    assert left == ["Reshape", "ReduceMax", "Div", "ReduceMin", "Div", "Max", "QuantizeLinear"]
    made = session_of(model, plain_library).run(None, {"A": x})
    np.testing.assert_array_equal(made[2], wanted[2])


def _other_constant(name: str, value: float) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        (constant,) = (one for one in model.graph.initializer if one.name == name)
        array = np.full_like(numpy_helper.to_array(constant), value)
        constant.CopyFrom(numpy_helper.from_array(array, name))

    return change


def _other_maker(output: str, operator: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        (node,) = (node for node in model.graph.node if output in node.output)
        node.op_type = operator

    return change


def _other_attribute(output: str, name: str, value: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        (node,) = (node for node in model.graph.node if output in node.output)
        (entry,) = (entry for entry in node.attribute if entry.name == name)
        entry.i = value

    return change


def _zero_points_of_rows(model: onnx.ModelProto) -> None:
    (node,) = (node for node in model.graph.node if node.op_type == "QuantizeLinear")
    node.input.append("zeros")


def _not_quantized(model: onnx.ModelProto) -> None:
    model.graph.node[-1].input[0] = "A"


def _external(model: onnx.ModelProto) -> None:
    for constant in model.graph.initializer:
        if constant.name == "steps":
            constant.data_location = TensorProto.EXTERNAL


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_other_constant("steps", 128.0), id="other steps"),
        pytest.param(_other_constant("minus_steps", -128.0), id="asymmetric steps"),
        pytest.param(_other_constant("least", 1e-3), id="another least scale"),
        pytest.param(_other_constant("signs", 0.5), id="factors that are no signs"),
        pytest.param(_other_constant("last", 1), id="another dimension"),
        pytest.param(_other_maker("high", "ReduceMean"), id="another bound"),
        pytest.param(_other_maker("scale", "Sum"), id="another scale"),
        pytest.param(_other_maker("restored_groups", "Add"), id="no product"),
        pytest.param(_other_attribute("integers", "axis", 1), id="another axis"),
        pytest.param(_other_attribute("integers", "block_size", 64), id="other blocks"),
        pytest.param(_other_attribute("integers", "output_dtype", TensorProto.INT4), id="4 bits"),
        pytest.param(_zero_points_of_rows, id="asymmetric rows"),
        pytest.param(_not_quantized, id="rows as they are"),
        pytest.param(_external, id="constants that are elsewhere"),
    ],
)
def test_other_rows_stay(change: Callable[[onnx.ModelProto], None]) -> None:
    model = _model(signs=_SIGNS)
    change(model)
    before = model.SerializeToString()
    assert count_products(model) == swap_products(model) == 0
    assert model.SerializeToString() == before


def test_the_least_scale_is_the_simulations() -> None:
    assert LEAST_SCALE == MIN_SCALE


def test_rows_in_other_blocks_stay() -> None:
    linear = random_linear(128, 9, 64, 4, zero_points=True, bias=True)
    model = model_of(linear, "MatMulNBits")
    nodes, constants = quantized_rows(128, 32)
    assert [node.op_type for node in model.graph.node[:-1]] == [node.op_type for node in nodes]
    for node, other in zip(model.graph.node[:-1], nodes, strict=True):
        node.CopyFrom(other)
    for one in model.graph.initializer:
        if one.name in constants:
            one.CopyFrom(numpy_helper.from_array(np.asarray(constants[one.name]), one.name))
    assert swap_products(model) == 0
