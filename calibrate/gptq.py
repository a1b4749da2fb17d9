"""GPTQ (arXiv 2210.17323) with any group size, as Q-DiT uses it for weights (method.md).

Columns are quantized in order; the error of each is spread over the columns not yet quantized so
that W x changes least. A group's scale comes from the error-updated weights at its first column,
and is rounded to the stored scale dtype before use, so that the columns make up for that too.

Updates are lazy: inside a block at once, to the columns behind it after the block. A block never
crosses a group's border unless it starts a group, so a group's columns are up to date when
its scale is computed, whatever the two sizes are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..progress import Progress, Silent
from .column_loop import ColumnLoops, LoopShape, group_parameters
from .hessian import HessianAccumulator, InverseFactor, exact_float32, inverse_factor
from .quantizers import QuantizedWeight, pack_values
from .schemes import LayerScheme

__all__ = ["GptqSettings", "HessianAccumulator", "gptq", "solve"]

_SILENT = Silent()


@dataclass(frozen=True)
class GptqSettings:
    """damping: share of the Hessian's mean diagonal that is added to it; block_size: columns per
    lazy block (speed only); clipped: shrink each group's range to its least squared error."""

    damping: float = 0.01
    block_size: int = 128
    clipped: bool = False


def gptq(
    weight: Tensor,
    hessian: Tensor,
    scheme: LayerScheme,
    *,
    damping: float = 0.01,
    block_size: int = 128,
    clipped: bool = False,
    progress: Progress = _SILENT,
) -> QuantizedWeight:
    """Quantize weight [N, K] for inputs of Hessian [K, K]; works in the weight's precision.

    Raises `InputError` for a scheme that leaves weights alone, and what `inverse_factor` raises.
    """
    with torch.no_grad(), exact_float32():
        wide = weight.dtype == torch.float64
        factor = inverse_factor(
            hessian.double() if wide else hessian.float(), damping, progress=progress
        )
        settings = GptqSettings(damping, block_size, clipped)
        return solve(weight, factor, scheme, settings, ColumnLoops())


def block_spans(in_features: int, group: int, block_size: int) -> list[tuple[int, int]]:
    """Column ranges [start, stop) of the lazy blocks.

    1. A group no larger than a block: as many whole groups as fit.
    2. A larger group: each group is cut into equal blocks (the last may be shorter).
    """
    if group <= block_size:
        width = block_size // group * group
        return [(i, min(i + width, in_features)) for i in range(0, in_features, width)]
    pieces = -(-group // block_size)
    width = -(-group // pieces)
    return [
        (start + i, start + min(i + width, group))
        for start in range(0, in_features, group)
        for i in range(0, group, width)
    ]


def solve(
    weight: Tensor,
    factor: InverseFactor,
    scheme: LayerScheme,
    settings: GptqSettings,
    loops: ColumnLoops,
) -> QuantizedWeight:
    """GPTQ of weight [N, K] by a factor that may be shared. Rows do not influence each other,
    so linears with the same input and scheme are solved together by stacking their rows."""
    if not scheme.quantizes_weights:
        raise InputError("GPTQ needs weight bits below 16, got 16; leave the linear as it is")
    n, k = weight.shape
    scheme.weight_only().check_fits("the weight", k)
    group = scheme.weight_group_size(k)
    columns = weight.t().to(factor.rows.dtype, copy=True, memory_format=torch.contiguous_format)
    columns.masked_fill_(factor.dead.unsqueeze(1), 0)
    values = torch.empty_like(columns)
    scale, zero_point = columns.new_empty(k // group, n), columns.new_empty(k // group, n)
    for start, stop in block_spans(k, group, settings.block_size):
        whole = group <= settings.block_size
        loop = loops.of(
            LoopShape(
                stop - start, n, group if whole else None, scheme.weight_only(), settings.clipped
            ),
            columns,
        )
        loop.columns.copy_(columns[start:stop])
        loop.factor.copy_(factor.rows[start:stop, start:stop])
        groups = slice(start // group, -(-stop // group))
        if not whole:
            if start % group == 0:
                found = group_parameters(columns[start : start + group], scheme, settings.clipped)
                scale[groups], zero_point[groups] = found
            loop.scale.copy_(scale[groups])
            loop.zero_point.copy_(zero_point[groups])
        loop.run()
        values[start:stop] = loop.values
        scale[groups], zero_point[groups] = loop.scale, loop.zero_point
        columns[stop:].addmm_(factor.rows[start:stop, stop:].t(), loop.errors, alpha=-1)
    return pack_values(
        values.t().contiguous(), scale.t().contiguous(), zero_point.t().contiguous(), scheme
    )
