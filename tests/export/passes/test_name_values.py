"""The numbered cases of `NameValuesPass`."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from qdit.export.passes.name_values import NameValuesPass

_TEXT = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[4] x) => (float[2] y)
<float[4] weight = {1.0, 1.0, 1.0, 1.0}, float[1] val_3 = {2.0}, int64[1] shape = {2}> {
  a = Add(x, weight)
  b = Add(a, val_3)
  c1, c2 = Split<num_outputs = 2>(b)
  d = Relu(x)
  e = Add(c1, c2)
  y = Reshape(e, shape)
}
"""

# as torch writes it: the modules from the outermost in, each with its class, and the operator
_NAMESPACE = (
    ": __main__.Wrapper/root: nn.Module/root.blocks.0: Block/root.blocks.0.norm: Norm/add: aten.add"
)


@pytest.fixture
def model() -> ir.Model:
    made = ir.from_proto(onnx.parser.parse_model(_TEXT))
    renamed = {"weight": "root.tied.weight", "val_3": "val_3", "shape": "shape/2"}
    for old, new in renamed.items():
        value = made.graph.initializers.pop(old)
        value.name = new
        made.graph.initializers[new] = value
    for index in (0, 1, 4):
        made.graph[index].metadata_props["namespace"] = _NAMESPACE
    NameValuesPass("root", {"tied.weight": "first.weight"})(made)
    return made


def test_names_nodes_by_module_and_numbers_repeats(model: ir.Model) -> None:
    """Case 1."""
    assert [model.graph[i].name for i in (0, 1, 4)] == [
        "blocks.0.norm/Add", "blocks.0.norm/Add_2", "blocks.0.norm/Add_3"
    ]  # fmt: skip


def test_nodes_without_a_path_take_that_of_their_input(model: ir.Model) -> None:
    """Case 2: the Split from the Add before it, the Relu of a graph input has none."""
    assert [model.graph[i].name for i in (2, 3, 5)] == [
        "blocks.0.norm/Split", "Relu", "blocks.0.norm/Reshape"
    ]  # fmt: skip


def test_names_values_by_their_node(model: ir.Model) -> None:
    """Case 3."""
    assert [v.name for v in model.graph[2].outputs] == [
        "blocks.0.norm/Split",
        "blocks.0.norm/Split:1",
    ]


def test_names_parameters_by_their_first_path(model: ir.Model) -> None:
    """Cases 4 to 6."""
    assert set(model.graph.initializers) == {"first.weight", "constant/1", "shape/2"}
    assert all(v.name == v.const_value.name for v in model.graph.initializers.values())


def test_keeps_inputs_and_outputs(model: ir.Model) -> None:
    assert [v.name for v in (*model.graph.inputs, *model.graph.outputs)] == ["x", "y"]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
