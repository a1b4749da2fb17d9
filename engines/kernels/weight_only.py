"""16-bit rows times quantized weights, for few rows: adaLN's linears."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError
from . import reference
from .driver import gpu_of, load_kernel
from .layouts import padded
from .rows import check_rows
from .variants import WeightOnlyKind
from .weights import PackedWeight

_CHANNELS = 128  # of one block: four warps of 32
_MOST_TOKENS = 32  # of one block: its sums stay in registers


def weight_only_linear(
    x: Tensor, weight: PackedWeight, kind: WeightOnlyKind, bias: Tensor | None = None
) -> Tensor:
    """y [M, N] = x · dequantized weightᵀ + bias in x's dtype, float16 or bfloat16.

    Each segment is summed in float32 by the matrix unit and added up in float32. Made for M of a
    few dozen; more rows read the weights again every 32. On a CPU the same is computed in torch.
    """
    check_rows(x, kind.width)
    if x.dtype == torch.float32:
        raise InputError("the weight-only product takes float16 or bfloat16 rows, got float32")
    if bias is not None and (bias.shape != (weight.channels,) or bias.dtype != x.dtype):
        raise InputError(
            f"the bias must be {x.dtype} [{weight.channels}], got {bias.dtype} {list(bias.shape)}"
        )
    count = x.shape[0]
    out = torch.empty(count, weight.channels, dtype=x.dtype, device=x.device)
    if not x.is_cuda:
        reference.weight_only(x, weight, bias, out)
        return out
    tokens = min(_MOST_TOKENS, padded(count, 8))
    defines = kind.defines(tokens, x.dtype == torch.bfloat16)
    kernel = load_kernel("weight_only.cu", "qdit_weight_only", defines, 0, gpu_of(x))
    kernel.launch(
        (-(-weight.channels // _CHANNELS), -(-count // tokens)),
        128,
        (
            x,
            weight.values,
            weight.scale,
            weight.zero,
            bias,
            count,
            weight.channels,
            kind.width,
            weight.rows,
            kind.weight_group // kind.segment,
            x.stride(0),
            out,
        ),
    )
    return out
