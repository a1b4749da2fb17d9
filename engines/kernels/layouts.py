"""How operands lie in device memory: as the kernels' shared memory will hold them.

A *panel* is 128 neighbouring k of all rows. Panels are stored one after the other, [K/128, rows,
128] bytes, so that any number of rows of a panel is one contiguous copy. The eight 16-byte chunks
of row r stand in the order of the 128-byte swizzle that Hopper's matrix unit reads (PTX ISA,
'Shared Memory Matrix Layout'): chunk c is at place c XOR (r mod 8).

4-bit weights are the matrix unit's register operand instead: [K/128, N/64, 4096 bytes], each 4096
bytes one warpgroup's 64 channels × 128 k in the order in which its threads take them up.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

PANEL = 128
ROW_STEP = 16  # rows are padded to this many
_ATOM = 8  # rows of one swizzle atom
CHANNEL_STEP = 64  # output channels of one warpgroup
_CHUNK = 16


def padded(count: int, step: int) -> int:
    """`count` rounded up to a multiple of `step`."""
    return -(-count // step) * step


def to_panels(values: Tensor, row_step: int = ROW_STEP) -> Tensor:
    """Integers [R, K] (int8) → int8 [⌈K/128⌉, R', 128], R' = R rounded up; padding is zero."""
    rows, width = values.shape
    whole = functional.pad(
        values, (0, padded(width, PANEL) - width, 0, padded(rows, row_step) - rows)
    )
    panels = whole.unflatten(1, (-1, PANEL)).transpose(0, 1)
    return _swizzled(panels).contiguous()


def from_panels(panels: Tensor, rows: int, width: int) -> Tensor:
    """The inverse of `to_panels`: int8 [rows, width]."""
    return _swizzled(panels).transpose(0, 1).flatten(1)[:rows, :width].contiguous()


def _swizzled(panels: Tensor) -> Tensor:
    """Chunk c of row r to place c XOR (r mod 8), which is its own inverse. [P, R, 128]."""
    rows = torch.arange(panels.shape[1], device=panels.device)
    places = torch.arange(PANEL // _CHUNK, device=panels.device)
    order = places ^ (rows % _ATOM).unsqueeze(1)
    index = order[None, :, :, None].expand(len(panels), -1, -1, _CHUNK)
    return panels.unflatten(2, (-1, _CHUNK)).gather(2, index).flatten(2)


def scale_order(rows: int) -> Tensor:
    """int64 [rows], a multiple of 16: where the scale of each row stands in a row of scales.

    A thread of the products needs rows 2q, 2q + 1, 2q + 8 and 2q + 9 of every sixteen, q = 0 … 3,
    and finds them side by side.
    """
    row = torch.arange(rows)
    return (row & ~15) | (row & 6) << 1 | (row & 8) >> 2 | (row & 1)


def to_fragments(values: Tensor) -> Tensor:
    """Signed 4-bit integers [N, K] (int8, −8 … 7) → uint8 [⌈K/128⌉, N'/64, 4096].

    Thread t of a warpgroup (warp w = t // 32, lane l = t mod 32) holds, for each of the panel's
    four steps of 32 k, channels r = 16w + l // 4 and r + 8 at k = 4(l mod 4) + i and 16 further on,
    i = 0 … 3 (PTX ISA, register fragment A of wgmma m64k32 and mma m16n8k32 for 8-bit types). Byte
    i of a word has channel r in its low nibble and r + 8 in its high one, in two's complement; a
    step's two words are k < 16 and k ≥ 16. The words of steps 0 and 1 of all threads come first, 16
    bytes a thread, then those of steps 2 and 3.
    """
    channels, width = values.shape
    whole = functional.pad(
        values,
        (0, padded(width, PANEL) - width, 0, padded(channels, CHANNEL_STEP) - channels),
    )
    # N' = slab · warp · half (r or r + 8) · row, K = panel · pair · step · part · quad · i
    axes = whole.reshape(-1, 4, 2, 8, whole.shape[1] // PANEL, 2, 2, 2, 4, 4)
    nibbles = axes.view(torch.uint8) & 0xF
    low, high = nibbles.select(2, 0), nibbles.select(2, 1)
    both = low | high << 4  # slab, warp, row, panel, pair, step, part, quad, i
    # → panel, slab, pair, (warp, row, quad) = thread, (step, part, i) = 16 bytes
    ordered = both.permute(3, 0, 4, 1, 2, 7, 5, 6, 8)
    return ordered.reshape(ordered.shape[0], ordered.shape[1], -1).contiguous()


def from_fragments(fragments: Tensor, channels: int, width: int) -> Tensor:
    """The inverse of `to_fragments`: int8 [channels, width]."""
    panels, slabs, _ = fragments.shape
    ordered = fragments.reshape(panels, slabs, 2, 4, 8, 4, 2, 2, 4)
    both = ordered.permute(1, 3, 4, 0, 2, 6, 7, 5, 8)
    nibbles = torch.stack((both & 0xF, both >> 4), dim=2)
    values = (nibbles ^ 8).view(torch.int8) - 8
    return values.reshape(slabs * CHANNEL_STEP, panels * PANEL)[:channels, :width].contiguous()
