"""Packing of b-bit integers into bytes (docs/format.md, 'Packed integers').

Each row of [N, K] integers is a little-endian bit stream: value i takes bits [i·b, (i+1)·b) of its
row, bit j being bit j mod 8 (least significant first) of byte j // 8. At 4 bits value 0 is the low
nibble, as ONNX packs INT4. Symmetric values are two's complement, asymmetric ones plain. A row is
padded with zero bits to a whole byte; rows of a multiple of 8 values need no padding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from .integers import IntegerRange

PACKED_BITS = (2, 3, 4, 6, 8)


def packed_width(columns: int, bits: int) -> int:
    """Bytes of one packed row of `columns` values: ceil(columns·bits / 8)."""
    return (columns * bits + 7) // 8


def pack(values: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Pack integers [N, K] (any integer dtype) into uint8 [N, ceil(K·b/8)].

    Raises `InputError` for a width without a layout and for values outside the b-bit range.
    """
    _check_bits(bits)
    _check_range(values, bits, symmetric)
    if bits == 8:
        return values.to(torch.int8).view(torch.uint8) if symmetric else values.to(torch.uint8)
    columns = values.shape[1]
    if values.numel() == 0:
        return values.new_empty(len(values), packed_width(columns, bits), dtype=torch.uint8)
    lanes = F.pad(values.to(torch.uint8) & ((1 << bits) - 1), (0, -columns % 8)).contiguous()
    words = _gather(lanes.view(torch.int64), bits)
    return _low_bytes(words, bits)[:, : packed_width(columns, bits)].contiguous()


def unpack(packed: Tensor, columns: int, bits: int, symmetric: bool) -> Tensor:
    """The [N, columns] integers of `pack`'s bytes: int8 when symmetric, uint8 otherwise.

    Raises `InputError` unless `packed` is uint8 [N, ceil(columns·b/8)].
    """
    _check_bits(bits)
    width = packed_width(columns, bits)
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != width:
        raise InputError(
            f"{columns} values of {bits} bits must be packed as uint8 [N, {width}], "
            f"got {packed.dtype} {list(packed.shape)}"
        )
    if bits == 8:
        return packed.view(torch.int8) if symmetric else packed
    if packed.numel() == 0:
        dtype = torch.int8 if symmetric else torch.uint8
        return packed.new_empty(len(packed), columns, dtype=dtype)
    whole = F.pad(packed, (0, -width % bits)).contiguous()
    lanes = _scatter(_words_of(whole, bits), bits).view(torch.uint8)
    values = lanes.view(torch.int8) if symmetric else lanes
    if symmetric:
        # (v xor 2^(b−1)) − 2^(b−1) extends the sign of a b-bit two's complement number
        values.bitwise_xor_(1 << (bits - 1)).sub_(1 << (bits - 1))
    return values[:, :columns].contiguous()


def padding_is_zero(packed: Tensor, columns: int, bits: int) -> bool:
    """Whether the bits after the last value of every row are 0, so that bytes are canonical."""
    used = columns * bits % 8
    return used == 0 or not bool((packed[:, -1] >> used).any())


# Eight values travel as the eight bytes of one int64 word (little-endian, as every host torch runs
# on); three shift-and-mask steps bring their 8·b bits together. Whole-word operations keep
# this at memory speed where byte-strided ones are twenty times slower.


def _lane_mask(lane_bits: int, used_bits: int) -> int:
    """The lowest `used_bits` of every lane of a 64-bit word."""
    return sum(((1 << used_bits) - 1) << start for start in range(0, 64, lane_bits))


def _gather(words: Tensor, bits: int) -> Tensor:
    """Words of eight b-bit values, one a byte → words whose low 8·b bits are the stream."""
    for doubling in (1, 2, 4):
        lane, used = 16 * doubling, bits * doubling
        upper = (words >> (lane // 2 - used)) & (_lane_mask(lane, used) << used)
        words = (words & _lane_mask(lane, used)).bitwise_or_(upper)
    return words


def _scatter(words: Tensor, bits: int) -> Tensor:
    """The inverse of `_gather`."""
    for doubling in (4, 2, 1):
        lane, used = 16 * doubling, bits * doubling
        upper = (words & (_lane_mask(lane, used) << used)) << (lane // 2 - used)
        words = (words & _lane_mask(lane, used)).bitwise_or_(upper)
    return words


_WHOLE_WORDS = {2: torch.int16, 4: torch.int32}


def _low_bytes(words: Tensor, bits: int) -> Tensor:
    """int64 [N, W] → uint8 [N, W·b]: the low b bytes of every word."""
    if bits in _WHOLE_WORDS:
        return words.to(_WHOLE_WORDS[bits]).view(torch.uint8)
    return words.view(torch.uint8).unflatten(1, (-1, 8))[..., :bits].flatten(1)


def _words_of(packed: Tensor, bits: int) -> Tensor:
    """uint8 [N, W·b] → int64 [N, W]; bits above 8·b are whatever sign extension left."""
    if bits in _WHOLE_WORDS:
        return packed.view(_WHOLE_WORDS[bits]).to(torch.int64)
    return F.pad(packed.unflatten(1, (-1, bits)), (0, 8 - bits)).flatten(1).view(torch.int64)


def _check_bits(bits: int) -> None:
    if bits not in PACKED_BITS:
        choices = ", ".join(map(str, PACKED_BITS))
        raise InputError(f"packed integers have {choices} bits, got {bits!r}")


def _check_range(values: Tensor, bits: int, symmetric: bool) -> None:
    if values.dim() != 2 or values.is_floating_point() or values.is_complex():
        raise InputError(
            f"pack takes an integer matrix [N, K], got {values.dtype} {list(values.shape)}"
        )
    if values.numel() == 0:
        return
    allowed = IntegerRange.of(bits, symmetric)
    low, high = (int(bound) for bound in values.aminmax())
    if low < allowed.low or high > allowed.high:
        kind = "symmetric" if symmetric else "asymmetric"
        raise InputError(
            f"{kind} {bits}-bit values must lie in [{allowed.low}, {allowed.high}], "
            f"got [{low}, {high}]; quantize with the same bits and symmetry as you pack"
        )
