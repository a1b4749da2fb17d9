"""Which nodes become ours, case by case, and that they compute what they computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdit.engines.cpu_kernels.swap import DOMAIN, OPERATOR, count_products, swap_products

from .conftest import model_of, random_linear, random_rows, session_of


def _model(*, zero_points: bool = True, bias: bool = True, bits: int = 4) -> onnx.ModelProto:
    linear = random_linear(128, 9, 32, bits, zero_points=zero_points, bias=bias)
    model = model_of(linear, "MatMulNBits")
    del model.opset_import[-1]
    assert [entry.domain for entry in model.opset_import] == ["", "com.microsoft"]
    return model


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_points", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_a_replaced_node_computes_the_same(
    bias: bool, zero_points: bool, bits: int, library: Path
) -> None:
    model = _model(zero_points=zero_points, bias=bias, bits=bits)
    x = random_rows(5, 128)
    (wanted,) = session_of(model, None).run(None, {"A": x})
    assert count_products(model) == swap_products(model) == 1
    assert count_products(model) == swap_products(model) == 0
    (node,) = model.graph.node
    assert (node.domain, node.op_type, list(node.output)) == (DOMAIN, OPERATOR, ["y"])
    assert {entry.name for entry in node.attribute} == {"K", "N", "bits", "block_size"}
    assert [entry.domain for entry in model.opset_import].count(DOMAIN) == 1
    (made,) = session_of(model, library).run(None, {"A": x})
    assert np.linalg.norm(made - wanted) <= 1e-6 * np.linalg.norm(wanted)


def _attribute(name: str, value: int | None) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        node = model.graph.node[0]
        for entry in [entry for entry in node.attribute if entry.name == name]:
            node.attribute.remove(entry)
        if value is not None:
            node.attribute.append(helper.make_attribute(name, value))

    return change


def _computed(name: str) -> Callable[[onnx.ModelProto], None]:
    """An input that the graph computes."""

    def change(model: onnx.ModelProto) -> None:
        inputs = model.graph.node[0].input
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
    model.graph.node[0].input[4] = "indices"
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(128, np.int32), "indices"))


def _domain(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain = "com.example"


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
    assert found == {"K": 128, "N": 9, "bits": 4, "block_size": 32}
