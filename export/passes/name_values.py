"""Names a person can read, from the module path that each node was traced in."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import onnx_ir as ir

_NAMESPACE = "namespace"  # the node metadata in which torch keeps the modules around a node


class NameValuesPass(ir.passes.InPlacePass):
    """Name nodes, their outputs and initializers by module path.

    Requires: torch's node metadata. Ensures: all names unique; outputs, inputs and dtypes as they
    were. Cases:

    1. A node traced in module `a.b` → 'a.b/OpType', with '_2', '_3' … for further ones there.
    2. A node without a path (folding drops it) → as if traced where its first input was made;
       without such an input → 'OpType', numbered alike.
    3. An inner value → its node's name, with ':1', ':2' … for further outputs.
    4. A parameter → its path in the denoiser, a tied one its first path.
    5. A small constant → 'constant/N' in graph order.
    6. Kept: graph inputs and outputs, and names under 'shape/'.
    """

    def __init__(self, root: str, first_names: Mapping[str, str]) -> None:
        super().__init__()
        self.root = root
        self.first_names = first_names

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        taken: Counter[str] = Counter()
        paths: dict[ir.Node, str] = {}
        for node in graph:
            source = node.inputs[0].producer() if node.inputs and node.inputs[0] else None
            path = self._path(node) or (paths[source] if source is not None else "")
            paths[node] = path
            base = f"{path}/{node.op_type}" if path else node.op_type
            taken[base] += 1
            node.name = base if taken[base] == 1 else f"{base}_{taken[base]}"
            for index, output in enumerate(node.outputs):
                if not output.is_graph_output():
                    output.name = node.name if index == 0 else f"{node.name}:{index}"
        self._name_initializers(graph)
        return ir.passes.PassResult(model, True)

    def _path(self, node: ir.Node) -> str:
        """'transformer_blocks.0.attn1' from '…/denoiser.transformer_blocks.0.attn1: Class/…'."""
        namespace = node.metadata_props.get(_NAMESPACE, "")
        found: list[str] = re.findall(rf"(?:^|/){self.root}\.([\w.]+): ", namespace)
        return found[-1] if found else ""

    def _name_initializers(self, graph: ir.Graph) -> None:
        values = list(graph.initializers.values())
        graph.initializers.clear()
        constants = 0
        for value in values:
            name = (value.name or "").removeprefix(f"{self.root}.")
            if name in self.first_names:
                name = self.first_names[name]
            elif not name.startswith("shape/"):
                constants += 1
                name = f"constant/{constants}"
            value.name = name
            if value.const_value is not None:
                value.const_value.name = name
            graph.initializers[name] = value
