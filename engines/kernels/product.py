"""The integer product with group scales on both sides, bias, and adaLN's gate."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...errors import InputError
from . import reference
from .driver import Argument, Gpu, Kernel, gpu_of, load_kernel
from .operands import Gate, QuantizedRows
from .tuning import tile_for
from .variants import LinearKind, Tile, linear_defines, linear_shared_bytes, tile_problem
from .weights import PackedWeight


def linear(
    rows: QuantizedRows,
    weight: PackedWeight,
    kind: LinearKind,
    *,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    gate: Gate | None = None,
    out: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """y [M, N] = dequantized rows · dequantized weightᵀ + bias, in float16 or bfloat16.

    Sums within a segment are exact integers, segments are added up in float32. `tile` is the
    tuned one by default (`tuning.tile_for`). On a CPU the same is computed in torch, in float64.
    Raises `InputError` for operands or a tile that do not fit.
    """
    _check(rows, weight, kind, bias, dtype)
    if gate is not None:
        _check_gate(gate, rows.count, weight.channels, dtype)
    if out is None:
        out = torch.empty(rows.count, weight.channels, dtype=dtype, device=rows.values.device)
    if not rows.values.is_cuda:
        reference.linear(rows, weight, kind, bias, gate, out)
        return out
    device = gpu_of(rows.values)
    if tile is None:
        tile = tile_for(kind, rows.count, weight.channels, device)
    elif (problem := tile_problem(kind, tile, device)) is not None:
        raise InputError(f"the tile {tile} does not fit the product: {problem}")
    if weight.heavy:
        tile = replace(tile, starts=False)
    kernel = linear_kernel(kind, tile, device, gated=gate is not None, dtype=dtype)
    blocks, threads = _grid(rows.count, weight.channels, tile, device)
    kernel.launch((blocks, 1), threads, _arguments(rows, weight, kind, bias, gate, out))
    return out


def linear_kernel(
    kind: LinearKind, tile: Tile, device: Gpu, *, gated: bool, dtype: torch.dtype
) -> Kernel:
    """The compiled product for this GPU."""
    file = "linear_sm90.cu" if device.hopper else "linear_sm80.cu"
    bfloat16 = dtype == torch.bfloat16
    defines = linear_defines(kind, tile, hopper=device.hopper, gated=gated, bfloat16=bfloat16)
    shared = linear_shared_bytes(kind, tile, device.hopper)
    return load_kernel(file, "qdit_linear", defines, shared, device)


def _grid(count: int, channels: int, tile: Tile, device: Gpu) -> tuple[int, int]:
    """(blocks, threads): on Hopper as many blocks as stay resident, elsewhere one a tile."""
    tiles = -(-count // tile.tokens) * -(-channels // tile.channels)
    if not device.hopper:
        return tiles, 128 * tile.warpgroups
    return min(tiles, device.multiprocessors), 128 * (tile.warpgroups + 1)


def _arguments(
    rows: QuantizedRows,
    weight: PackedWeight,
    kind: LinearKind,
    bias: Tensor | None,
    gate: Gate | None,
    out: Tensor,
) -> tuple[Argument, ...]:
    """In the order of `qdit_linear`'s parameters."""
    return (
        rows.values,
        rows.scale,
        rows.total,
        rows.zero,
        weight.values,
        weight.scale,
        weight.zero,
        weight.total,
        weight.multiplier,
        bias,
        None if gate is None else gate.residual,
        None if gate is None else gate.gate,
        rows.count,
        weight.channels,
        kind.panels,
        rows.rows,
        weight.rows,
        kind.segments_of(kind.activation_group),
        kind.segments_of(kind.weight_group or kind.multiplier_group),
        0 if gate is None else gate.gate.stride(0),
        1 if gate is None else gate.image_tokens,
        out,
    )


def _check(
    rows: QuantizedRows,
    weight: PackedWeight,
    kind: LinearKind,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> None:
    if rows.kind.width != weight.width or kind.width != weight.width:
        raise InputError(
            f"rows and weight must have the same width, got {rows.kind.width} and {weight.width}"
        )
    if (kind.activation_group or kind.width) != rows.kind.group:
        raise InputError(
            f"the product needs rows of group {kind.activation_group or kind.width}, "
            f"got {rows.kind.group}"
        )
    if kind.input_zero != rows.kind.asymmetric or kind.weight_zero != (rows.total is not None):
        raise InputError("the product's zero points must be those of its rows and weight")
    if dtype not in (torch.float16, torch.bfloat16):
        raise InputError(f"products are written in float16 or bfloat16, got {dtype}")
    if weight.channels % 8:
        raise InputError(f"output channels must be a multiple of 8, got {weight.channels}")
    if bias is not None and (bias.shape != (weight.channels,) or bias.dtype != dtype):
        raise InputError(
            f"the bias must be {dtype} [{weight.channels}], got {bias.dtype} {list(bias.shape)}"
        )


def _check_gate(gate: Gate, count: int, channels: int, dtype: torch.dtype) -> None:
    images = -(-count // gate.image_tokens)
    residual, factor = gate.residual, gate.gate
    if residual.shape != (count, channels) or residual.dtype != dtype:
        raise InputError(
            f"the residual must be {dtype} [{count}, {channels}], got {residual.dtype} "
            f"{list(residual.shape)}"
        )
    if factor.shape != (images, channels) or factor.dtype != dtype or factor.stride(1) != 1:
        raise InputError(
            f"the gate must be {dtype} [{images}, {channels}] with contiguous rows, got "
            f"{factor.dtype} {list(factor.shape)}"
        )
    aligned = factor.stride(0) % 8 == 0 and factor.data_ptr() % 16 == 0
    if not (residual.is_contiguous() and aligned and residual.data_ptr() % 16 == 0):
        raise InputError("the residual must be contiguous, and the gate's rows start at 16 bytes")
