"""The generic passes that follow a trace, in their order."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants

from .static_shapes import StaticShapesPass

# Elements up to which equal initializers are merged by value here. Weights come later and are
# merged as they are written (`spool_initializers.py`).
_SMALL = 1 << 16


class FoldConstantsPass(ir.passes.InPlacePass):
    """onnxscript's constant folding as a pass.

    Requires: a valid model. Ensures: nodes whose inputs are all small constants are replaced by
    their value; sequences that torch makes of `chunk` become Split.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        result = fold_constants(model)
        return ir.passes.PassResult(model, bool(result.modified))


def clean_up() -> ir.passes.Sequential:
    """Fold constants, make shapes static, merge equal subexpressions, drop what is unused.

    Requires: a traced model. Ensures: the same outputs from fewer nodes: constants are
    initializers, equal small ones stored once, equal nodes (the embedder that every block calls,
    the SiLU after it) computed once, no Identity, no dead node. A second run changes nothing.
    """
    return ir.passes.Sequential(
        FoldConstantsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        StaticShapesPass(),
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.DeduplicateInitializersPass(size_limit=_SMALL),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
    )
