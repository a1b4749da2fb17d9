"""Rows quantized at run time: the activations of the integer products, and what quantizes them."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError
from . import reference
from .driver import gpu_of, load_kernel
from .operands import Modulation, QuantizedRows
from .variants import WARPS_A_BLOCK, QuantizeKind

DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def quantize_rows(
    x: Tensor, kind: QuantizeKind, modulation: Modulation | None = None
) -> QuantizedRows:
    """Quantize x [M, K] (float16, bfloat16 or float32; rows contiguous, any row stride).

    On a CPU the same is computed in torch. Raises `InputError` for operands that do not fit.
    """
    check_rows(x, kind.width)
    if kind.normalized != (modulation is not None):
        raise InputError("a normalized kind needs its modulation, and only it takes one")
    if modulation is not None:
        _check_modulation(modulation, x, kind.width)
    rows = QuantizedRows.empty(x.shape[0], kind, x.device)
    if x.is_cuda:
        _launch(x, rows, modulation)
    else:
        reference.quantize(x, rows, modulation)
    return rows


def _launch(x: Tensor, rows: QuantizedRows, modulation: Modulation | None) -> None:
    kind = rows.kind
    kernel = load_kernel(
        "quantize.cu",
        "qdit_quantize",
        kind.defines(DTYPES[x.dtype]),
        kind.shared_bytes,
        gpu_of(x),
    )
    given = (
        (None, None, 0, 1, 0.0)
        if modulation is None
        else (
            modulation.shift,
            modulation.scale,
            modulation.shift.stride(0),
            modulation.image_tokens,
            modulation.epsilon,
        )
    )
    shift, scale, stride, image_tokens, epsilon = given
    kernel.launch(
        kind.grid(rows.count),
        32 * WARPS_A_BLOCK,
        (
            x,
            shift,
            scale,
            rows.count,
            rows.rows,
            x.stride(0) // 4,
            stride,
            image_tokens,
            epsilon,
            rows.values,
            rows.scale,
            rows.zero,
            rows.total,
        ),
    )


def check_rows(x: Tensor, width: int) -> None:
    """Raise `InputError` unless x is a matrix that the kernels can read."""
    if x.dim() != 2 or x.shape[1] != width or x.shape[0] < 1 or x.dtype not in DTYPES:
        raise InputError(
            f"the kernels take float16, bfloat16 or float32 rows [M, {width}] with M ≥ 1, got "
            f"{x.dtype} {list(x.shape)}"
        )
    if x.stride(1) != 1 or x.stride(0) % 4 or x.data_ptr() % 16:
        raise InputError(
            "rows must be contiguous, start at 16 bytes and lie a multiple of 4 values apart, got "
            f"strides {x.stride()}; call .contiguous()"
        )


def _check_modulation(modulation: Modulation, x: Tensor, width: int) -> None:
    shift, scale = modulation.shift, modulation.scale
    images = -(-x.shape[0] // modulation.image_tokens)
    for what, value in (("shift", shift), ("scale", scale)):
        if value.shape != (images, width) or value.dtype not in (torch.float16, torch.bfloat16):
            raise InputError(
                f"{what} must be 16-bit [{images}, {width}], got {value.dtype} {list(value.shape)}"
            )
        if value.stride(1) != 1 or value.data_ptr() % 8 or value.stride(0) % 4:
            raise InputError(f"{what} must have contiguous rows that start at 8 bytes")
    if shift.dtype != scale.dtype or shift.stride(0) != scale.stride(0):
        raise InputError("shift and scale must have one dtype and one stride")
    if x.dtype != shift.dtype:
        raise InputError(f"shift and scale must have the rows' dtype {x.dtype}, got {shift.dtype}")
