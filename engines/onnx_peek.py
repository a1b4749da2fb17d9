"""Which operators an ONNX file has, without its weights: a few reads, and no import of `onnx`.

The file is a protobuf message, a sequence of fields with their lengths before them, so everything
but the graph's nodes is skipped. Fields by number, from onnx.proto: ModelProto.graph 7,
GraphProto.node 1, NodeProto.op_type 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_GRAPH, _NODE, _OP_TYPE = 7, 1, 4
_VARINT, _EIGHT_BYTES, _DELIMITED, _FOUR_BYTES = 0, 1, 2, 5
_VARINT_BYTES = 10


class _MalformedError(Exception):
    """The bytes are no protobuf message."""


def operators_of(path: Path) -> frozenset[str] | None:
    """The operators of the graph's nodes, those inside other nodes left out; None where the file
    is no ONNX file that ends well. Raises `OSError` where it cannot be read."""
    found = set()
    with path.open("rb") as file:
        size = path.stat().st_size
        try:
            for graph in _submessages(file, size, _GRAPH):
                for node in _submessages(file, graph, _NODE):
                    for end in _submessages(file, node, _OP_TYPE):
                        found.add(file.read(end - file.tell()).decode())
        except (_MalformedError, UnicodeDecodeError):
            return None
    return frozenset(found)


def _submessages(file: BinaryIO, end: int, wanted: int) -> Iterator[int]:
    """For each field `wanted` of the message up to `end`: the file at its start, and its end."""
    while file.tell() < end:
        key = _varint(file)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            _varint(file)
            continue
        if kind not in (_EIGHT_BYTES, _DELIMITED, _FOUR_BYTES):
            raise _MalformedError
        length = _varint(file) if kind == _DELIMITED else 8 if kind == _EIGHT_BYTES else 4
        stop = file.tell() + length
        if stop > end:
            raise _MalformedError
        if number == wanted and kind == _DELIMITED:
            yield stop
        file.seek(stop)


def _varint(file: BinaryIO) -> int:
    """Seven bits a byte, the lowest first; the last byte is below 128."""
    value = 0
    for place in range(_VARINT_BYTES):
        byte = file.read(1)
        if not byte:
            raise _MalformedError
        value |= (byte[0] & 0x7F) << (7 * place)
        if byte[0] < 0x80:
            return value
    raise _MalformedError
