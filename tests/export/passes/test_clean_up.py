"""`clean_up`: fewer nodes, equal results, nothing left to do."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from qdit.export.passes.clean_up import clean_up

_TEXT = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[batch, 4] x) => (float[batch, 4] y) {
  one = Constant<value = float[4] {1, 1, 1, 1}>()
  again = Constant<value = float[4] {1, 1, 1, 1}>()
  two = Add(one, again)
  a = Sigmoid(x)
  b = Sigmoid(x)
  c = Mul(a, one)
  d = Mul(b, again)
  e = Identity(c)
  f = Add(e, d)
  unused = Exp(f)
  y = Mul(f, two)
}
"""


def _model() -> ir.Model:
    return ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(_TEXT)))


def _run(model: ir.Model) -> np.ndarray:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    (y,) = session.run(None, {"x": x})
    return y


def test_merges_folds_and_drops() -> None:
    model = _model()
    clean_up()(model)
    assert [node.op_type for node in model.graph] == ["Sigmoid", "Mul", "Add", "Mul"]
    assert len(model.graph.initializers) == 2
    np.testing.assert_array_equal(_run(model), _run(_model()))


def test_is_idempotent() -> None:
    model = _model()
    clean_up()(model)
    once = [(node.op_type, tuple(v.name for v in node.inputs)) for node in model.graph]
    clean_up()(model)
    assert [(node.op_type, tuple(v.name for v in node.inputs)) for node in model.graph] == once
