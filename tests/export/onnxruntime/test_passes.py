"""What the passes around the linears fuse, narrow and keep (their docstrings number the cases)."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdit.export.onnxruntime.fuse_modulation import FuseModulationPass
from qdit.export.onnxruntime.narrow_initializers import NarrowInitializersPass

D = 8
ROW = ("batch", 1, D)


def _modulated(
    weight: float = 1.0, bias: float = 0.0, shift: tuple[object, ...] = ROW, shown: bool = False
) -> onnx.ModelProto:
    """y = LayerNormalization(x) · scale + shift."""
    info = helper.make_tensor_value_info
    float32 = TensorProto.FLOAT
    x, out = ["batch", 4, D], [info("y", float32, ["batch", 4, D])]
    values = [info(name, float32, x) for name in ("normalized", "scaled")]
    graph = helper.make_graph(
        [
            helper.make_node("LayerNormalization", ["x", "w", "b"], ["normalized"], axis=-1),
            helper.make_node("Mul", ["normalized", "scale"], ["scaled"]),
            helper.make_node("Add", ["scaled", "shift"], ["y"]),
        ],
        "g",
        [info("x", float32, x), info("scale", float32, ROW), info("shift", float32, shift)],
        [*out, *([values[1]] if shown else [])],
        [
            numpy_helper.from_array(np.full(D, weight, np.float32), "w"),
            numpy_helper.from_array(np.full(D, bias, np.float32), "b"),
        ],
        value_info=values[: 1 if shown else 2],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


class TestFuseModulation:
    def test_scale_and_shift_become_weight_and_bias(self) -> None:
        before = _modulated()
        model = ir.from_proto(before)
        assert FuseModulationPass()(model).modified
        assert [node.op_type for node in model.graph] == ["LayerNormalization"]
        rng = np.random.default_rng(0)
        given = {
            "x": rng.standard_normal((2, 4, D)).astype(np.float32),
            "scale": rng.standard_normal((2, 1, D)).astype(np.float32),
            "shift": rng.standard_normal((2, 1, D)).astype(np.float32),
        }
        made, wanted = (
            onnxruntime.InferenceSession(proto.SerializeToString()).run(["y"], given)[0]
            for proto in (ir.to_proto(model), before)
        )
        np.testing.assert_allclose(made, wanted, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        "case",
        [
            pytest.param({"weight": 2.0}, id="a weight of its own"),
            pytest.param({"bias": 1.0}, id="a bias of its own"),
            pytest.param({"shift": ("batch", 4, D)}, id="a shift for each token"),
            pytest.param({"shown": True}, id="the scaled value is an output"),
        ],
    )
    def test_keeps(self, case: dict[str, object]) -> None:
        model = ir.from_proto(_modulated(**case))  # type: ignore[arg-type]
        assert not FuseModulationPass()(model).modified
        assert len(list(model.graph)) == 3


def _reader(values: np.ndarray, op_type: str = "Add") -> ir.Model:
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node(op_type, ["x", "w"], ["y"])],
        "g",
        [info("x", TensorProto.FLOAT, values.shape)],
        [info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(values, "w")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


class TestNarrowInitializers:
    def test_what_float16_holds_is_stored_in_it(self) -> None:
        model = _reader(np.full((64, 64), 0.5, np.float32))
        assert NarrowInitializersPass()(model).modified
        (stored,) = model.graph.initializers.values()
        assert stored.dtype == ir.DataType.FLOAT16
        assert stored.name == "w/float16"
        cast = stored.uses()[0].node
        assert cast.op_type == "Cast"
        assert cast.outputs[0].name == "w"

    @pytest.mark.parametrize(
        ("values", "op_type"),
        [
            pytest.param(np.full((64, 64), 0.1, np.float32), "Add", id="float16 would round"),
            pytest.param(np.full((64, 64), 1e6, np.float32), "Add", id="float16 would overflow"),
            pytest.param(np.full((4, 4), 0.5, np.float32), "Add", id="small"),
            pytest.param(np.full((64, 64), 1, np.int32), "Add", id="another dtype"),
            pytest.param(np.full((64, 64), 0.5, np.float32), "MatMulNBits", id="MatMulNBits"),
        ],
    )
    def test_keeps(self, values: np.ndarray, op_type: str) -> None:
        model = _reader(values, op_type)
        assert not NarrowInitializersPass()(model).modified
        assert list(model.graph.initializers) == ["w"]
