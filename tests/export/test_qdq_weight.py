"""Packing of integers as ONNX stores them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from qdit.export.qdq_weight import integer_tensor, storage_dtype

GOLDEN = [
    # -2, -1, 0, 1 → 0xE, 0xF, 0x0, 0x1, the first of a pair in the low nibble
    pytest.param([-2, -1, 0, 1], torch.int8, "INT4", b"\xfe\x10", id="int4"),
    # -8, 7, 3 → 0x8, 0x7, 0x3, and a zero nibble fills the last byte
    pytest.param([-8, 7, 3], torch.int8, "INT4", b"\x78\x03", id="int4 odd"),
    # 15, 0, 9, 4 → 0xF, 0x0, 0x9, 0x4
    pytest.param([15, 0, 9, 4], torch.uint8, "UINT4", b"\x0f\x49", id="uint4"),
    # -128, -1, 127 in two's complement
    pytest.param([-128, -1, 127], torch.int8, "INT8", b"\x80\xff\x7f", id="int8"),
    pytest.param([0, 128, 255], torch.uint8, "UINT8", b"\x00\x80\xff", id="uint8"),
]


@pytest.mark.parametrize(("values", "kind", "dtype", "data"), GOLDEN)
def test_golden_bytes(values: list[int], kind: torch.dtype, dtype: str, data: bytes) -> None:
    made = integer_tensor(torch.tensor(values, dtype=kind), ir.DataType[dtype])
    assert made.tobytes() == data


@pytest.mark.parametrize("dtype", ["INT4", "UINT4", "INT8", "UINT8"])
def test_onnx_reads_what_was_packed(dtype: str) -> None:
    low, high = (-8, 8) if dtype.startswith("I") else (0, 16)
    kind = torch.int8 if dtype.startswith("I") else torch.uint8
    values = torch.randint(low, high, (6, 10), dtype=kind).T  # not contiguous, as weights are
    proto = ir.to_proto(integer_tensor(values, ir.DataType[dtype]))
    read = onnx.numpy_helper.to_array(proto).astype(np.int32)
    np.testing.assert_array_equal(read, values.numpy())


@pytest.mark.parametrize(
    ("bits", "symmetric", "dtype"),
    [(2, True, "INT4"), (3, True, "INT4"), (4, False, "UINT4"), (6, True, "INT8"),
     (6, False, "UINT8"), (8, True, "INT8")],
)  # fmt: skip
def test_storage(bits: int, symmetric: bool, dtype: str) -> None:
    assert storage_dtype(bits, symmetric) == ir.DataType[dtype]
