"""Tiles as TensorRT's tactics: positive integers that it times and stores in the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...kernels.driver import Gpu
from ...kernels.tuning import by_rule, candidates, tile_for
from ...kernels.variants import LinearKind, Tile

_WITHOUT_ASKING = 48 << 10  # shared memory of a launch that needs no function attribute
# tokens 9 bits, warpgroups 2, stages 4, turns 2, pipelined 1, splits − 1 2
_SHIFTS = (0, 9, 11, 15, 17, 18)
_MASKS = (0x1FF, 0x3, 0xF, 0x3, 0x1, 0x3)


def tactic_of(tile: Tile) -> int:
    """A tile that does not start its sums from a constant, as one positive integer."""
    parts = (
        tile.tokens, tile.warpgroups, tile.stages, tile.turns, int(tile.pipelined), tile.splits - 1
    )  # fmt: skip
    return sum(part << shift for part, shift in zip(parts, _SHIFTS, strict=True))


def tile_of(tactic: int) -> Tile:
    """The inverse of `tactic_of`. Raises `InputError` for what is no tile."""
    parts = [tactic >> shift & mask for shift, mask in zip(_SHIFTS, _MASKS, strict=True)]
    tokens, warpgroups, stages, turns, pipelined, more = parts
    return Tile(tokens, warpgroups, stages, turns, bool(pipelined), splits=1 + more)


def tiles_for(kind: LinearKind, rows: Sequence[int], channels: int, gpu: Gpu) -> list[Tile]:
    """What TensorRT may choose from: the tuned tile of each row count, and one that fits into
    48 KB of shared memory, should a TensorRT not ask for more."""
    # no sums from a constant: the weights, which must allow it, are not known here
    chosen = [replace(tile_for(kind, count, channels, gpu), starts=False) for count in rows]
    small = list(candidates(kind, replace(gpu, shared_bytes=_WITHOUT_ASKING), turns=(0,)))
    if small:
        chosen.append(min(small, key=by_rule(rows[0], channels, gpu)))
    return list(dict.fromkeys(chosen))
