"""The numbered cases of `SpoolInitializersPass`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qdit.export.passes.spool_initializers import ALIGNMENT, SpoolInitializersPass


def _model(**tensors: ir.TensorProtocol) -> ir.Model:
    """A graph in which every initializer is read by a node of its own."""
    values = []
    for name, tensor in tensors.items():
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape))
        value.const_value = tensor
        values.append(value)
    nodes = [ir.node("Identity", [value]) for value in values]
    for node, value in zip(nodes, values, strict=True):
        node.outputs[0].name = f"{value.name}_out"
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph([], outputs, nodes=nodes, initializers=values, opset_imports={"": 21})
    return ir.Model(graph, ir_version=10)


def _floats(count: int, seed: int = 0) -> ir.TensorProtocol:
    return ir.tensor(np.random.default_rng(seed).normal(size=count).astype(np.float32))


def test_moves_large_tensors_to_aligned_offsets(tmp_path: Path) -> None:
    """Cases 1 and 3."""
    model = _model(small=_floats(8), a=_floats(300, 1), b=_floats(500, 2))
    before = {name: v.const_value.numpy() for name, v in model.graph.initializers.items()}
    spool = SpoolInitializersPass(tmp_path / "data")
    assert spool(model).modified
    after = {name: v.const_value for name, v in model.graph.initializers.items()}
    assert [isinstance(after[name], ir.ExternalTensor) for name in ("small", "a", "b")] == [
        False, True, True
    ]  # fmt: skip
    assert [after[name].offset for name in ("a", "b")] == [0, ALIGNMENT]
    assert spool.byte_size == ALIGNMENT + 2000 == (tmp_path / "data").stat().st_size
    for name, array in before.items():
        np.testing.assert_array_equal(after[name].numpy(), array)


def test_stores_equal_tensors_once(tmp_path: Path) -> None:
    """Case 2: equal bytes of another dtype or shape are another tensor."""
    zeros = np.zeros(1024, np.float32)
    model = _model(
        a=ir.tensor(zeros),
        b=ir.tensor(zeros.copy()),
        c=ir.tensor(zeros.view(np.int32)),
        d=ir.tensor(zeros.reshape(32, 32)),
        e=_floats(4),
        f=_floats(4),
    )
    SpoolInitializersPass(tmp_path / "data")(model)
    assert list(model.graph.initializers) == ["a", "c", "d", "e"]
    assert [node.inputs[0].name for node in model.graph] == ["a", "a", "c", "d", "e", "e"]


def test_keeps_an_equal_initializer_that_is_an_output(tmp_path: Path) -> None:
    """Case 4."""
    model = _model(a=_floats(4), b=_floats(4))
    model.graph.outputs.append(model.graph.initializers["b"])
    SpoolInitializersPass(tmp_path / "data")(model)
    assert list(model.graph.initializers) == ["a", "b"]


def test_evaluates_lazy_and_packed_tensors(tmp_path: Path) -> None:
    packed = np.arange(2048, dtype=np.uint32).astype(np.uint8)
    lazy = ir.LazyTensor(
        lambda: ir.PackedTensor(packed, ir.DataType.INT4, shape=ir.Shape([4096])),
        ir.DataType.INT4,
        ir.Shape([4096]),
        name="w",
    )
    model = _model(w=lazy)
    SpoolInitializersPass(tmp_path / "data")(model)
    assert (tmp_path / "data").read_bytes() == packed.tobytes()
    assert model.graph.initializers["w"].const_value.dtype == ir.DataType.INT4


def test_refuses_a_tensor_that_is_not_what_it_declares(tmp_path: Path) -> None:
    lazy = ir.LazyTensor(lambda: _floats(3), ir.DataType.FLOAT, ir.Shape([4]), name="w")
    with pytest.raises(ValueError, match=r"initializer w must be FLOAT \[4\], got FLOAT \[3\]"):
        SpoolInitializersPass(tmp_path / "data")(_model(w=lazy))
