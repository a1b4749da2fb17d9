"""The bit layout of packed integers: golden bytes, the ONNX INT4 layout, round trips, refusals."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx.numpy_helper
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qdit.calibrate.integers import IntegerRange
from qdit.calibrate.packing import PACKED_BITS, pack, packed_width, padding_is_zero, unpack
from qdit.errors import InputError

# Value i takes bits [i·b, (i+1)·b), least significant bit of the first byte first. The comments
# write the whole stream as one number, last value leftmost, and cut it into bytes from the right.
GOLDEN = [
    # 01 00 11 10 → 0100'1110
    pytest.param(2, True, [-2, -1, 0, 1], b"\x4e", id="2-bit two's complement"),
    # 11 10 01 00 → 1110'0100
    pytest.param(2, False, [0, 1, 2, 3], b"\xe4", id="2-bit plain"),
    # 011 010 001 000 111 110 101 100 → 0110'1000 1000'1111 1010'1100
    pytest.param(
        3, True, [-4, -3, -2, -1, 0, 1, 2, 3], b"\xac\x8f\x68", id="3-bit two's complement"
    ),
    # 111 110 101 100 011 010 001 000 → 1111'1010 1100'0110 1000'1000
    pytest.param(3, False, [0, 1, 2, 3, 4, 5, 6, 7], b"\x88\xc6\xfa", id="3-bit plain"),
    # 111 010 001 → 1'1101'0001, then seven zero bits to the byte border
    pytest.param(3, False, [1, 2, 7], b"\xd1\x01", id="3-bit padded"),
    # -2, -1, 0, 1 → 0xE, 0xF, 0x0, 0x1; the low nibble is the first value
    pytest.param(4, True, [-2, -1, 0, 1], b"\xfe\x10", id="4-bit two's complement"),
    pytest.param(4, False, [1, 2, 15, 0], b"\x21\x0f", id="4-bit plain"),
    # 9 → the low nibble; the high one is padding
    pytest.param(4, False, [3, 12, 9], b"\xc3\x09", id="4-bit padded"),
    # 011111 000000 111111 100000 → 0111'1100 0000'1111 1110'0000
    pytest.param(6, True, [-32, -1, 0, 31], b"\xe0\x0f\x7c", id="6-bit two's complement"),
    # 111111 000011 000010 000001 → 1111'1100 0011'0000 1000'0001
    pytest.param(6, False, [1, 2, 3, 63], b"\x81\x30\xfc", id="6-bit plain"),
    pytest.param(8, True, [-128, -1, 0, 127], b"\x80\xff\x00\x7f", id="8-bit two's complement"),
    pytest.param(8, False, [0, 1, 128, 255], b"\x00\x01\x80\xff", id="8-bit plain"),
]


@pytest.mark.parametrize(("bits", "symmetric", "values", "expected"), GOLDEN)
def test_golden_bytes(bits: int, symmetric: bool, values: list[int], expected: bytes) -> None:
    matrix = torch.tensor([values, values[::-1]])
    packed = pack(matrix, bits, symmetric)
    assert packed.dtype == torch.uint8
    assert bytes(packed[0].tolist()) == expected
    restored = unpack(packed, len(values), bits, symmetric)
    assert restored.dtype == (torch.int8 if symmetric else torch.uint8)
    assert torch.equal(restored.long(), matrix)


@pytest.mark.parametrize("symmetric", [True, False], ids=["INT4", "UINT4"])
def test_four_bits_are_packed_as_onnx_packs_them(symmetric: bool) -> None:
    values = np.arange(-8, 8) if symmetric else np.arange(16)
    dtype = ml_dtypes.int4 if symmetric else ml_dtypes.uint4
    proto = onnx.numpy_helper.from_array(values.astype(dtype))
    packed = pack(torch.from_numpy(values).view(1, -1), 4, symmetric)
    assert bytes(packed.flatten().tolist()) == proto.raw_data


def bit_by_bit(values: np.ndarray, bits: int) -> np.ndarray:
    """The layout restated: write each value's bits to the row's bit stream, one after another."""
    rows = []
    for row in values:
        stream = [(int(value) >> bit) & 1 for value in row for bit in range(bits)]
        rows.append(np.packbits(np.array(stream, np.uint8), bitorder="little"))
    return np.array(rows, np.uint8).reshape(len(values), -1)


@st.composite
def integer_matrices(draw: st.DrawFn) -> tuple[int, bool, np.ndarray]:
    bits, symmetric = draw(st.sampled_from(PACKED_BITS)), draw(st.booleans())
    allowed = IntegerRange.of(bits, symmetric)
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=2, max_side=40))
    elements = st.integers(allowed.low, allowed.high)
    return bits, symmetric, draw(hnp.arrays(np.int16, shape, elements=elements))


@given(integer_matrices())
@settings(max_examples=150, deadline=None)
def test_any_matrix_is_packed_bit_by_bit_and_comes_back(
    case: tuple[int, bool, np.ndarray],
) -> None:
    bits, symmetric, values = case
    packed = pack(torch.from_numpy(values), bits, symmetric)
    assert np.array_equal(packed.numpy(), bit_by_bit(values, bits))
    assert packed.shape[1] == packed_width(values.shape[1], bits)
    assert padding_is_zero(packed, values.shape[1], bits)
    restored = unpack(packed, values.shape[1], bits, symmetric)
    assert np.array_equal(restored.numpy(), values)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_every_byte_string_unpacks_to_values_in_range_and_packs_back(data: st.DataObject) -> None:
    bits, symmetric = data.draw(st.sampled_from(PACKED_BITS)), data.draw(st.booleans())
    columns = 8 * data.draw(st.integers(1, 5))  # no padding: each byte counts
    packed = torch.tensor(
        [list(data.draw(st.binary(min_size=columns * bits // 8, max_size=columns * bits // 8)))],
        dtype=torch.uint8,
    )
    values = unpack(packed, columns, bits, symmetric)
    allowed = IntegerRange.of(bits, symmetric)
    assert values.min() >= allowed.low
    assert values.max() <= allowed.high
    assert torch.equal(pack(values, bits, symmetric), packed)


def test_rows_are_packed_apart_from_one_another() -> None:
    values = torch.randint(-4, 4, (6, 37), generator=torch.Generator().manual_seed(0))
    packed = pack(values, 3, True)
    for row, alone in zip(values, packed, strict=True):
        assert torch.equal(pack(row.view(1, -1), 3, True)[0], alone)


def test_a_view_that_is_not_contiguous_packs_as_its_copy() -> None:
    values = torch.randint(0, 16, (24, 16), generator=torch.Generator().manual_seed(0)).T
    assert torch.equal(pack(values, 4, False), pack(values.contiguous(), 4, False))


def test_packing_leaves_its_input_alone() -> None:
    values = torch.tensor([[-8, 7, -1, 0, 3, 2, 1, -5]], dtype=torch.int8)
    packed = pack(values, 4, True)
    assert values.tolist() == [[-8, 7, -1, 0, 3, 2, 1, -5]]
    before = packed.clone()
    unpack(packed, 8, 4, True)
    assert torch.equal(packed, before)


@pytest.mark.parametrize(
    ("bits", "symmetric", "value", "allowed"),
    [
        (4, True, 8, r"\[-8, 7\]"),
        (4, True, -9, r"\[-8, 7\]"),
        (4, False, -1, r"\[0, 15\]"),
        (4, False, 16, r"\[0, 15\]"),
        (2, True, 2, r"\[-2, 1\]"),
        (3, False, 8, r"\[0, 7\]"),
        (6, True, 32, r"\[-32, 31\]"),
        (8, True, 128, r"\[-128, 127\]"),
        (8, False, 256, r"\[0, 255\]"),
    ],
)
def test_values_out_of_range_are_refused(
    bits: int, symmetric: bool, value: int, allowed: str
) -> None:
    with pytest.raises(InputError, match=rf"{bits}-bit values must lie in {allowed}"):
        pack(torch.tensor([[0, value]]), bits, symmetric)


@pytest.mark.parametrize("bits", [0, 1, 5, 7, 16])
def test_other_widths_have_no_layout(bits: int) -> None:
    with pytest.raises(InputError, match=r"2, 3, 4, 6, 8 bits, got"):
        pack(torch.zeros(1, 8, dtype=torch.int8), bits, True)
    with pytest.raises(InputError, match=r"2, 3, 4, 6, 8 bits, got"):
        unpack(torch.zeros(1, 8, dtype=torch.uint8), 8, bits, True)


@pytest.mark.parametrize(
    "values",
    [torch.zeros(2, 8), torch.zeros(8, dtype=torch.int8), torch.zeros(1, 2, 8, dtype=torch.int8)],
    ids=["float", "1-D", "3-D"],
)
def test_only_integer_matrices_are_packed(values: torch.Tensor) -> None:
    with pytest.raises(InputError, match="integer matrix"):
        pack(values, 4, True)


@pytest.mark.parametrize(
    "packed",
    [
        torch.zeros(1, 5, dtype=torch.uint8),
        torch.zeros(1, 4, dtype=torch.int8),
        torch.zeros(4, dtype=torch.uint8),
    ],
    ids=["too wide", "int8", "1-D"],
)
def test_bytes_of_another_form_are_not_unpacked(packed: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"8 values of 4 bits must be packed as uint8 \[N, 4\]"):
        unpack(packed, 8, 4, True)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)], ids=["no rows", "no columns"])
def test_empty_matrices_pack_to_nothing(shape: tuple[int, int]) -> None:
    packed = pack(torch.zeros(shape, dtype=torch.int8), 3, True)
    assert packed.numel() == 0
    assert unpack(packed, shape[1], 3, True).shape == shape


def test_padding_that_is_not_zero_is_seen() -> None:
    # three 4-bit values: the high nibble of the second byte is padding
    packed = torch.tensor([[0xC3, 0x09], [0xC3, 0x19]], dtype=torch.uint8)
    assert padding_is_zero(packed[:1], 3, 4)
    assert not padding_is_zero(packed, 3, 4)
