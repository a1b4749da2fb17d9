"""Store float initializers in half the bytes where that loses nothing."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

# Below this, the node that widens a constant costs more than the bytes it saves.
SMALLEST_NARROWED = 4096


class NarrowInitializersPass(ir.passes.InPlacePass):
    """Float32 initializers that float16 holds exactly → float16 ones and a Cast.

    Requires: initializers that evaluate to their declared dtype and shape.
    Ensures: every reader reads the same float32 values. ONNX Runtime folds the Cast as it loads
    the file. The checkpoint stores what it left untouched, and most scales, in float16, so that
    the file need not be larger than the checkpoint. Cases:

    1. Float32, `SMALLEST_NARROWED` bytes or more, every value kept by float16 and back: narrowed.
    2. Kept: values that float16 would round, or that are not finite.
    3. Kept: smaller initializers, other dtypes, initializers that are outputs.
    4. Kept: what MatMulNBits reads. ONNX Runtime 1.32 computes it wrong, by 100 %, where its scales
       are no initializers, which they are not where optimization is off and the Cast not folded.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        first = next(iter(graph), None)
        modified = False
        for value in list(graph.initializers.values()):
            if first is not None and _is_candidate(value) and _fits(value):
                _narrow(graph, value, first)
                modified = True
        return ir.passes.PassResult(model, modified)


def _is_candidate(value: ir.Value) -> bool:
    tensor = value.const_value
    return (
        tensor is not None
        and tensor.dtype == ir.DataType.FLOAT
        and tensor.nbytes >= SMALLEST_NARROWED
        and not value.is_graph_output()
        and all(node.op_type != "MatMulNBits" for node, _ in value.uses())
    )


def _fits(value: ir.Value) -> bool:
    wide = _array(value.const_value)
    with np.errstate(over="ignore"):
        return bool(np.array_equal(wide.astype(np.float16).astype(np.float32), wide))


def _array(tensor: ir.TensorProtocol | None) -> np.ndarray:
    """The values, read for this once: a lazy tensor of a large model must not be kept."""
    if tensor is None:
        raise ValueError("an initializer has no data")
    evaluated = tensor.raw() if isinstance(tensor, ir.LazyTensor) else tensor
    return evaluated.numpy()


def _narrow(graph: ir.Graph, value: ir.Value, first: ir.Node) -> None:
    tensor, name, shape = value.const_value, str(value.name), value.shape
    if shape is None:
        raise ValueError(f"the shape of initializer {name} is not known")
    half = ir.Value(name=f"{name}/float16", type=ir.TensorType(ir.DataType.FLOAT16), shape=shape)
    half.const_value = ir.LazyTensor(
        partial(_narrowed, tensor), ir.DataType.FLOAT16, shape, name=half.name
    )
    cast = ir.node("Cast", [half], {"to": ir.DataType.FLOAT.value}, name=f"{name}/float32")
    wide = cast.outputs[0]
    wide.shape, wide.dtype = shape, ir.DataType.FLOAT
    graph.insert_before(first, cast)
    ir.convenience.replace_all_uses_with(value, wide)
    del graph.initializers[name]
    wide.name = name
    graph.register_initializer(half)


def _narrowed(tensor: ir.TensorProtocol | None) -> ir.TensorProtocol:
    return ir.tensor(_array(tensor).astype(np.float16))
