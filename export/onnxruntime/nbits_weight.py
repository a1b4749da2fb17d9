"""Weights of `com.microsoft::MatMulNBits`: blocks along K for each channel, two integers a byte.

At accuracy level 4 the operator adds up a·u over unsigned weight integers u and takes the zero
point's part z·Σa away afterwards. Activations with a mean (after SiLU or GELU) make both sums much
larger than their difference, and its float32 rounding error with them: 1e-5 was measured at K =
4608. So every other block is turned around: there activations are negated (`rows.py`), u becomes
2^b - 1 - u and z becomes 2^b - 1 - z, which leaves each product what it was. The large sums then
cancel while they are added up: 1e-6. Zero points cost no time: they are packed at load.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ...calibrate.quantizers import QuantizedWeight
from ..contents import LinearContents
from ..emit import Emitter
from .rows import FLOAT, UINT8, block_signs

_FOUR_BITS, _BYTE = 4, 8


def emit_nbits_weight(
    emit: Emitter,
    contents: LinearContents,
    block: int,
    *,
    turned: bool,
    blocks: range | None = None,
) -> tuple[list[ir.Value | None], dict[str, Any]]:
    """MatMulNBits' inputs after the activations, and its attributes but for the accuracy level.

    B is UINT8 [N, K/block, block·bits/8], scales float32 [N, K/block], zero points UINT8
    [N, ⌈K/block·bits/8⌉], packed like B along the blocks. Cases:

    1. 2, 3 and 4 bits are stored as 4, 6 and 8 bits as 8.
    2. Symmetric integers are shifted by 2^(b-1) of the plan's own bits, their zero point.
    3. Asymmetric: the plan's zero points.
    4. `block` smaller than the weight group: scales and zero points are repeated.
    5. Integer scales: the groups' factors s·m.
    6. `turned`: blocks of `block_signs` -1 are turned around, for activations that are too.
    7. `blocks`: those alone, as the weight of a narrower product; all of them by default.
    """
    spec, scheme = contents.spec, contents.scheme
    n, k = spec.out_features, spec.in_features
    bits = _FOUR_BITS if scheme.weight_bits <= _FOUR_BITS else _BYTE
    repeats = scheme.weight_group_size(k) // block
    every = range(k // block)
    part = every if blocks is None else blocks
    name = f"{spec.name}.weight" + ("" if part == every else f"_from_{part.start * block}")
    load = contents.quantized
    width = -(-len(part) * bits // 8)
    inputs: list[ir.Value | None] = [
        emit.initializer(
            name,
            UINT8,
            [n, len(part), block * bits // 8],
            partial(_values, load, bits, block, turned, part),
        ),
        emit.initializer(
            f"{name}_scale", FLOAT, [n, len(part)], partial(_scale, load, repeats, part)
        ),
        emit.initializer(
            f"{name}_zero_point",
            UINT8,
            [n, width],
            partial(_zero_point, load, bits, repeats, turned, part),
        ),
    ]
    return inputs, {"K": len(part) * block, "N": n, "bits": bits, "block_size": block}


def pack(values: Tensor, bits: int) -> Tensor:
    """Unsigned integers of 4 or 8 bits along the last dimension, the first in the low nibble.

    An odd last one is padded with zero: 1, 2, 15 → b"\\x21\\x0f".
    """
    if bits == _BYTE:
        return values
    if values.shape[-1] % 2:
        values = torch.nn.functional.pad(values, (0, 1))
    return values[..., 0::2] | (values[..., 1::2] << 4)


def _values(
    load: Callable[[], QuantizedWeight], bits: int, block: int, turned: bool, part: range
) -> ir.TensorProtocol:
    weight = load()
    n, k = weight.values.shape
    values = weight.values
    if weight.zero_point is None:
        values = (values.to(torch.int16) + _midpoint(weight)).to(torch.uint8)
    blocks = values.reshape(n, k // block, block)
    if turned:
        blocks = _turned(blocks, weight.bits, dim=1)
    kept = blocks[:, part.start : part.stop]
    return ir.tensor(pack(kept, bits).contiguous().numpy(), UINT8)


def _midpoint(weight: QuantizedWeight) -> int:
    return 1 << (weight.bits - 1)


def _turned(values: Tensor, bits: int, dim: int) -> Tensor:
    """2^bits - 1 - value in the blocks, along `dim`, whose sign is -1."""
    signs = torch.from_numpy(block_signs(values.shape[dim]))
    shape = [-1 if axis == dim else 1 for axis in range(values.dim())]
    return torch.where(signs.reshape(shape) < 0, (1 << bits) - 1 - values, values)


def _scale(load: Callable[[], QuantizedWeight], repeats: int, part: range) -> ir.TensorProtocol:
    scale = load().scale.repeat_interleave(repeats, 1)[:, part.start : part.stop]
    return ir.tensor(np.ascontiguousarray(scale.numpy(), np.float32), FLOAT)


def _zero_point(
    load: Callable[[], QuantizedWeight], bits: int, repeats: int, turned: bool, part: range
) -> ir.TensorProtocol:
    weight = load()
    zero_point = weight.zero_point
    if zero_point is None:
        zero_point = torch.full_like(weight.scale, _midpoint(weight), dtype=torch.uint8)
    blocks = zero_point.repeat_interleave(repeats, 1)
    if turned:
        blocks = _turned(blocks, weight.bits, dim=1)
    kept = blocks[:, part.start : part.stop]
    return ir.tensor(pack(kept, bits).contiguous().numpy(), UINT8)
