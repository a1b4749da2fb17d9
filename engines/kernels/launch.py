"""The kernels as functions of torch tensors, for eager runs and for capture in CUDA graphs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from .driver import Gpu, Kernel, gpu_of, load_kernel
from .layouts import PANEL, padded
from .operands import PackedWeight, QuantizedRows
from .variants import (
    ROWS_A_BLOCK,
    Epilogue,
    LinearKind,
    QuantizeKind,
    Tile,
    WeightOnlyKind,
    linear_defines,
    linear_shared_bytes,
    tile_problem,
)

_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
_WEIGHT_ONLY_CHANNELS = 128  # of one block: four warps of 32


@dataclass(frozen=True)
class Modulation:
    """adaLN's shift and scale [images, K], views of one tensor, and what a row's image is.

    image_tokens: consecutive rows of one image; epsilon: of the normalization.
    """

    shift: Tensor
    scale: Tensor
    image_tokens: int
    epsilon: float


@dataclass(frozen=True)
class Gate:
    """y = residual + gate · product: residual [M, N], gate [images, N]."""

    residual: Tensor
    gate: Tensor
    image_tokens: int


def quantize_rows(
    x: Tensor, kind: QuantizeKind, modulation: Modulation | None = None
) -> QuantizedRows:
    """Quantize x [M, K] (float16, bfloat16 or float32; rows contiguous, any row stride)."""
    _check_rows(x, kind.width)
    if kind.normalized != (modulation is not None):
        raise InputError("a normalized kind needs its modulation, and only it takes one")
    device = gpu_of(x)
    rows = QuantizedRows.empty(x.shape[0], kind, x.device)
    kernel = load_kernel(
        "quantize.cu", "qdit_quantize", kind.defines(_DTYPES[x.dtype]), kind.shared_bytes, device
    )
    stride, image_tokens, epsilon = 0, 1, 0.0
    shift = scale = None
    if modulation is not None:
        shift, scale = modulation.shift, modulation.scale
        stride, image_tokens, epsilon = _modulation(modulation, x, kind.width)
    blocks = -(-x.shape[0] // ROWS_A_BLOCK)
    kernel.launch(
        (blocks, 1),
        32 * ROWS_A_BLOCK,
        (
            x,
            shift,
            scale,
            x.shape[0],
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
    return rows


def linear(
    rows: QuantizedRows,
    weight: PackedWeight,
    kind: LinearKind,
    tile: Tile,
    *,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    gate: Gate | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y [M, N] = dequantized rows · dequantized weightᵀ + bias, in float16 or bfloat16."""
    device = gpu_of(rows.values)
    _check_product(rows, weight, kind, bias, dtype)
    if gate is not None:
        _check_gate(gate, rows.count, weight.channels, dtype)
    if out is None:
        out = torch.empty(rows.count, weight.channels, dtype=dtype, device=rows.values.device)
    _launch_linear(
        rows,
        weight,
        kind,
        tile,
        Epilogue(gated=gate is not None),
        device,
        dtype,
        bias,
        gate,
        out,
        None,
    )
    return out


def linear_gelu_quantize(
    rows: QuantizedRows,
    weight: PackedWeight,
    kind: LinearKind,
    tile: Tile,
    *,
    out_kind: QuantizeKind,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> QuantizedRows:
    """GELU (tanh form) of the product, quantized as the next product's input. `dtype` is bias's.

    `out_kind` is symmetric with groups of 32, 64 or 128 that divide N.
    """
    device = gpu_of(rows.values)
    _check_product(rows, weight, kind, bias, dtype)
    if not can_fuse(out_kind) or out_kind.width != weight.channels:
        raise InputError(
            "a product quantizes its output with symmetric 8-bit groups of 32, 64 or 128 of its "
            f"{weight.channels} channels, got {out_kind}; quantize it in a step of its own"
        )
    made = QuantizedRows.empty(rows.count, out_kind, rows.values.device)
    epilogue = Epilogue(out_group=out_kind.group)
    _launch_linear(
        rows, weight, kind, tile, epilogue, device, dtype, bias, None, made.values, made.scale
    )
    return made


def can_fuse(kind: QuantizeKind) -> bool:
    """Whether a product can write its output in this form."""
    plain = not kind.asymmetric and kind.sum_group == 0 and kind.bits == 8
    return plain and kind.group in (32, 64, 128) and kind.width % PANEL == 0


def weight_only_linear(
    x: Tensor, weight: PackedWeight, kind: WeightOnlyKind, bias: Tensor | None = None
) -> Tensor:
    """y [M, N] = x · dequantized weightᵀ + bias in x's dtype (float16 or bfloat16), for small M."""
    _check_rows(x, kind.width)
    if x.dtype == torch.float32:
        raise InputError("the weight-only kernel takes float16 or bfloat16, got float32")
    device = gpu_of(x)
    count = x.shape[0]
    tokens = min(32, padded(count, 8))
    kernel = load_kernel(
        "weight_only.cu",
        "qdit_weight_only",
        kind.defines(tokens, x.dtype == torch.bfloat16),
        0,
        device,
    )
    out = torch.empty(count, weight.channels, dtype=x.dtype, device=x.device)
    grid = (-(-weight.channels // _WEIGHT_ONLY_CHANNELS), -(-count // tokens))
    kernel.launch(
        grid,
        128,
        (
            x,
            weight.values,
            weight.effective_scale,
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


def _launch_linear(
    rows: QuantizedRows,
    weight: PackedWeight,
    kind: LinearKind,
    tile: Tile,
    epilogue: Epilogue,
    device: Gpu,
    dtype: torch.dtype,
    bias: Tensor | None,
    gate: Gate | None,
    out: Tensor,
    out_scale: Tensor | None,
) -> None:
    problem = tile_problem(kind, tile, epilogue, device)
    if problem is not None:
        raise InputError(f"the tile {tile} does not fit the product: {problem}")
    kernel = linear_kernel(kind, tile, epilogue, dtype == torch.bfloat16, device)
    channel_group = kind.weight_group or kind.multiplier_group
    blocks, threads = linear_grid(rows.count, weight.channels, tile, device)
    kernel.launch(
        (blocks, 1),
        threads,
        (
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
            kind.segments_of(channel_group),
            max(1, kind.segment // PANEL),
            0 if gate is None else gate.gate.stride(0),
            1 if gate is None else gate.image_tokens,
            out,
            out_scale,
        ),
    )


def linear_kernel(
    kind: LinearKind, tile: Tile, epilogue: Epilogue, bfloat16: bool, device: Gpu
) -> Kernel:
    """The compiled product for this GPU."""
    file = "linear_sm90.cu" if device.hopper else "linear_sm80.cu"
    shared = linear_shared_bytes(kind, tile, epilogue, device.hopper)
    return load_kernel(
        file, "qdit_linear", linear_defines(kind, tile, epilogue, bfloat16), shared, device
    )


def linear_grid(count: int, channels: int, tile: Tile, device: Gpu) -> tuple[int, int]:
    """(blocks, threads): on Hopper as many blocks as stay resident, elsewhere one a tile."""
    across = -(-channels // (tile.channels * tile.cluster))
    tiles = -(-count // tile.tokens) * across
    if not device.hopper:
        return tiles, 128 * tile.warpgroups
    resident = device.multiprocessors // tile.cluster
    return min(tiles, resident) * tile.cluster, 128 * (tile.warpgroups + 1)


def _check_rows(x: Tensor, width: int) -> None:
    if x.dim() != 2 or x.shape[1] != width or x.shape[0] < 1 or x.dtype not in _DTYPES:
        raise InputError(
            f"the kernel takes float16, bfloat16 or float32 rows [M, {width}] with M ≥ 1, got "
            f"{x.dtype} {list(x.shape)}"
        )
    if x.stride(1) != 1 or x.stride(0) % 4 or x.data_ptr() % 16:
        raise InputError(
            "rows must be contiguous, start at 16 bytes and lie a multiple of 4 values apart, got "
            f"strides {x.stride()}; call .contiguous()"
        )


def _modulation(modulation: Modulation, x: Tensor, width: int) -> tuple[int, int, float]:
    shift, scale = modulation.shift, modulation.scale
    images = -(-x.shape[0] // modulation.image_tokens)
    for what, value in (("shift", shift), ("scale", scale)):
        if value.shape != (images, width) or value.dtype == torch.float32:
            raise InputError(
                f"{what} must be 16-bit [{images}, {width}], got {value.dtype} {list(value.shape)}"
            )
        if value.stride(1) != 1 or value.data_ptr() % 8 or value.stride(0) % 4:
            raise InputError(f"{what} must have contiguous, 8-byte aligned rows")
    if shift.dtype != scale.dtype or shift.stride(0) != scale.stride(0):
        raise InputError("shift and scale must have one dtype and one stride")
    if x.dtype != shift.dtype and x.dtype != torch.float32:
        raise InputError(f"shift and scale must have the rows' dtype {x.dtype}, got {shift.dtype}")
    return shift.stride(0), modulation.image_tokens, modulation.epsilon


def _check_product(
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
        raise InputError(f"the residual must be {dtype} [{count}, {channels}]")
    if factor.shape != (images, channels) or factor.dtype != dtype or factor.stride(1) != 1:
        raise InputError(f"the gate must be {dtype} [{images}, {channels}] with contiguous rows")
    aligned = factor.stride(0) % 8 == 0 and factor.data_ptr() % 16 == 0
    if not (residual.is_contiguous() and aligned and residual.data_ptr() % 16 == 0):
        raise InputError("the residual must be contiguous, the gate's rows 16-byte aligned")
