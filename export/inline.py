"""Serialize a model with its weights inside, streaming them from a file.

A protobuf message is its fields in any order, so a ModelProto is written here as its small fields,
then the graph: its small fields, then each initializer with its bytes copied from the spool file.
Only one initializer is in memory at a time; `SerializeToString` would need the model twice.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

# Field numbers of onnx.proto3: ModelProto.graph, GraphProto.initializer, TensorProto.raw_data.
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
_LENGTH_DELIMITED = 2


def write_inline(model: onnx.ModelProto, data: Path, target: Path) -> None:
    """Write `model`, whose external initializers lie in the file `data`, as one file `target`.

    `model` is emptied of its graph. Files above 2 GiB cannot be read back as protobuf: the caller
    checks the size.
    """
    tensors = list(model.graph.initializer)
    del model.graph.initializer[:]
    graph = model.graph.SerializeToString(deterministic=True)
    model.ClearField("graph")
    sizes = [_tensor_size(tensor) for tensor in tensors]
    total = len(graph) + sum(len(_key(_INITIALIZER, size)) + size for size in sizes)
    with target.open("wb") as file, data.open("rb") as source:
        file.write(model.SerializeToString(deterministic=True))
        file.write(_key(_GRAPH, total))
        file.write(graph)
        for tensor, size in zip(tensors, sizes, strict=True):
            file.write(_key(_INITIALIZER, size))
            _write_tensor(file, tensor, source)


def _write_tensor(file: BinaryIO, tensor: onnx.TensorProto, source: BinaryIO) -> None:
    header, length = _header(tensor)
    file.write(header)
    if length:
        file.write(_key(_RAW_DATA, length))
        source.seek(ExternalDataInfo(tensor).offset or 0)
        _copy(source, file, length)


def _copy(source: BinaryIO, target: BinaryIO, length: int) -> None:
    chunk = 1 << 22
    while length:
        data = source.read(min(chunk, length))
        if not data:
            raise EOFError("the spool file ends before its last tensor")
        target.write(data)
        length -= len(data)


def _tensor_size(tensor: onnx.TensorProto) -> int:
    header, length = _header(tensor)
    return len(header) + (len(_key(_RAW_DATA, length)) + length if length else 0)


def _header(tensor: onnx.TensorProto) -> tuple[bytes, int]:
    """The tensor's message without raw_data, and the bytes of raw_data that follow it."""
    if not uses_external_data(tensor):
        return tensor.SerializeToString(deterministic=True), 0
    bare = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    return bare.SerializeToString(deterministic=True), ExternalDataInfo(tensor).length or 0


def _key(field: int, length: int) -> bytes:
    """A length-delimited field's key and length."""
    return _varint(field << 3 | _LENGTH_DELIMITED) + _varint(length)


def _varint(value: int) -> bytes:
    """Base-128, low groups first, the top bit set on all but the last: 300 → b"\\xac\\x02"."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
