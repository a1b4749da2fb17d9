"""Write a model of opset 18 as one of opset 17, the newest that TensorRT 8.6 reads."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from ...errors import StepError

NEWER, OLDER = 18, 17


class OlderOpsetPass(ir.passes.InPlacePass):
    """Opset 18 → 17, for the operators that a traced denoiser is made of.

    Requires: an opset-18 model without subgraphs. Ensures: an opset-17 model with the same outputs.
    Cases:

    1. Split(num_outputs=n) → Split with the sizes as its second input.
    2. Reshape(allowzero=1) to a constant shape without a zero → allowzero left out: it means
       nothing there, and older parsers know it by halves.
    3. Kept: operators whose definition opset 18 left as it was.
    4. Refused with `StepError`: every other operator that opset 18 changed or brought.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        if graph.opset_imports[""] != NEWER:
            raise StepError(f"expected opset {NEWER}, got {graph.opset_imports['']}")
        for node in graph:
            if node.domain not in ("", "ai.onnx"):
                continue
            if node.op_type == "Split" and "num_outputs" in node.attributes:
                _name_sizes(node, graph)
            elif node.op_type == "Reshape":
                _forget_allowzero(node)
            _check_unchanged(node)
        graph.opset_imports[""] = OLDER
        return ir.passes.PassResult(model, True)


def _name_sizes(node: ir.Node, graph: ir.Graph) -> None:
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    sizes = [output.shape[axis] if output.shape else None for output in node.outputs]
    if not all(isinstance(size, int) for size in sizes):
        raise StepError(f"{node.name} splits into parts of unknown size; opset {OLDER} needs them")
    name = f"split/{'x'.join(map(str, sizes))}"
    constant = graph.initializers.get(name)
    if constant is None:
        tensor = ir.tensor(np.array(sizes, np.int64), name=name)
        constant = ir.Value(name=name, const_value=tensor)
        constant.shape, constant.dtype = ir.Shape([len(sizes)]), ir.DataType.INT64
        graph.register_initializer(constant)
    node.resize_inputs(2)
    node.replace_input_with(1, constant)
    del node.attributes["num_outputs"]


def _forget_allowzero(node: ir.Node) -> None:
    shape = node.inputs[1].const_value if node.inputs[1] is not None else None
    if "allowzero" in node.attributes and shape is not None and (shape.numpy() != 0).all():
        del node.attributes["allowzero"]


def _check_unchanged(node: ir.Node) -> None:
    try:
        older = onnx.defs.get_schema(node.op_type, OLDER, "").since_version
        newer = onnx.defs.get_schema(node.op_type, NEWER, "").since_version
    except onnx.defs.SchemaError as error:
        raise StepError(f"opset {OLDER} has no operator {node.op_type} ({node.name})") from error
    if older != newer and node.op_type != "Split":
        raise StepError(
            f"{node.name}: opset {NEWER} changed {node.op_type}, and this has no older form here"
        )
