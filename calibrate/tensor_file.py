"""The safetensors file of an artifact: a streaming, deterministic writer and a distrustful reader.

Format (github huggingface/safetensors, 'Format'): 8 bytes little-endian header length, that many
bytes of JSON `{name: {"dtype", "shape", "data_offsets": [begin, end]}}`, then the data, no holes.
The writer gives the bytes that the library's own writer gives (dtypes by falling size, then
names), but holds one tensor at a time. The reader checks the whole header before anything is
allocated, and then lets the library map the file.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from ..progress import Progress, Silent
from .artifact_errors import (
    FileTooLargeError,
    InvalidHeaderError,
    SizeMismatchError,
    TruncatedFileError,
    WrongDtypeError,
)
from .strict_json import parse_json_object

# DiT-XL/2 needs 0.1 MB; the library itself allows 100 MB.
MAX_HEADER_BYTES = 16 << 20
_MAX_RANK = 8
_LENGTH_BYTES = 8
_ALIGNMENT = 8
_SILENT = Silent()
DTYPE_BYTES = {"F32": 4, "F16": 2, "U8": 1}
TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "U8": torch.uint8}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """dtype ('F32', 'F16', 'U8') and shape of a stored tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def byte_size(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    @classmethod
    def of(cls, tensor: Tensor) -> TensorEntry:
        return cls(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


class Sink(Protocol):
    """What the writer needs of a file."""

    def write(self, data: bytes | memoryview, /) -> object: ...


@dataclass(frozen=True)
class Written:
    """Length and SHA-256 of a file just written."""

    bytes: int
    sha256: str


def stored_order(entries: Mapping[str, TensorEntry]) -> list[str]:
    """Names by falling dtype size (keeps every tensor aligned), then by name."""
    return sorted(entries, key=lambda name: (-DTYPE_BYTES[entries[name].dtype], name))


def header_bytes(entries: Mapping[str, TensorEntry]) -> bytes:
    """The file's first bytes: header length and header, padded with spaces to 8 bytes."""
    header: dict[str, Any] = {}
    offset = 0
    for name in stored_order(entries):
        entry = entries[name]
        end = offset + entry.byte_size
        header[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def file_size(entries: Mapping[str, TensorEntry]) -> int:
    """Bytes that `write_tensors` will write."""
    return len(header_bytes(entries)) + sum(entry.byte_size for entry in entries.values())


def write_tensors(
    handle: Sink,
    entries: Mapping[str, TensorEntry],
    tensor: Callable[[str], Tensor],
    progress: Progress = _SILENT,
    description: str = "writing tensors",
) -> Written:
    """Write the tensors that `tensor(name)` gives, one at a time, and return size and hash."""
    digest = hashlib.sha256()
    size = 0

    def put(data: bytes | memoryview) -> None:
        nonlocal size
        handle.write(data)
        digest.update(data)
        size += len(data)

    put(header_bytes(entries))
    for name in progress.track(stored_order(entries), description, total=len(entries)):
        value = tensor(name)
        if TensorEntry.of(value) != entries[name]:
            raise ValueError(f"tensor {name} is {TensorEntry.of(value)}, announced {entries[name]}")
        flat = value.detach().cpu().contiguous().view(-1)
        if flat.numel():
            put(flat.view(torch.uint8).numpy().data)
    return Written(size, digest.hexdigest())


def read_entries(path: Path) -> dict[str, TensorEntry]:
    """The checked header of a safetensors file, in stored order. Nothing else is read.

    Raises `TruncatedFileError`, `FileTooLargeError`, `InvalidJsonError`, `InvalidHeaderError`,
    `WrongDtypeError` or `SizeMismatchError`.
    """
    size = path.stat().st_size
    with path.open("rb") as handle:
        header = _read_header(handle, size, path)
    data_size = size - _LENGTH_BYTES - header.length
    metadata = header.value.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InvalidHeaderError(f"{path}: __metadata__ must map strings to strings")
    spans: list[tuple[int, int, str]] = []
    entries: dict[str, TensorEntry] = {}
    for name, value in header.value.items():
        entries[name], begin, end = _entry(name, value, path)
        spans.append((begin, end, name))
    _check_spans(sorted(spans), data_size, path)
    return {name: entries[name] for _, _, name in sorted(spans)}


@dataclass(frozen=True)
class _Header:
    length: int
    value: dict[str, Any]


def _read_header(handle: BinaryIO, size: int, path: Path) -> _Header:
    if size < _LENGTH_BYTES:
        raise TruncatedFileError(
            f"{path} must begin with an 8-byte header length, got {size} bytes; export again"
        )
    length = int.from_bytes(handle.read(_LENGTH_BYTES), "little")
    if length > MAX_HEADER_BYTES:
        raise FileTooLargeError(
            f"the header of {path} may have {MAX_HEADER_BYTES} bytes, it claims {length}"
        )
    if length > size - _LENGTH_BYTES:
        raise TruncatedFileError(
            f"{path} claims a header of {length} bytes, only {size - _LENGTH_BYTES} follow; "
            "export again"
        )
    text = handle.read(length)
    if not text.startswith(b"{"):
        raise InvalidHeaderError(f"the header of {path} must begin with '{{', got {text[:8]!r}")
    return _Header(length, parse_json_object(text, f"the header of {path}"))


def _entry(name: str, value: object, path: Path) -> tuple[TensorEntry, int, int]:
    """One header entry as (entry, begin, end), its byte count agreeing with its shape."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise InvalidHeaderError(
            f"{path}: tensor {name} must have exactly the keys dtype, shape, data_offsets"
        )
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise WrongDtypeError(
            f"{path}: tensor {name} must be one of {', '.join(DTYPE_BYTES)}, got {dtype!r}"
        )
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise InvalidHeaderError(f"{path}: shape and data_offsets of {name} must be whole numbers")
    if len(shape) > _MAX_RANK:
        raise InvalidHeaderError(
            f"{path}: tensor {name} may have {_MAX_RANK} dimensions, it has {len(shape)}"
        )
    entry = TensorEntry(dtype, tuple(shape))
    begin, end = offsets
    if end - begin != entry.byte_size:
        raise SizeMismatchError(
            f"{path}: tensor {name} of shape {shape} takes {entry.byte_size} bytes, "
            f"its offsets span {end - begin}"
        )
    return entry, begin, end


def _whole_numbers(value: object) -> bool:
    # type() and not isinstance: True is an int; 64 bits are what any reader can hold
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 1 << 63 for item in value
    )


def _check_spans(spans: list[tuple[int, int, str]], data_size: int, path: Path) -> None:
    """Data must follow in one piece: no hole, no overlap, no rest."""
    position = 0
    for begin, end, name in spans:
        if begin != position:
            raise SizeMismatchError(
                f"{path}: tensor {name} must begin at byte {position} of the data, got {begin}"
            )
        position = end
    if position > data_size:
        raise TruncatedFileError(
            f"{path}: the tensors take {position} bytes, the file has {data_size}; export again"
        )
    if position < data_size:
        raise SizeMismatchError(
            f"{path}: the tensors take {position} bytes, the file has {data_size}"
        )


class TensorFile:
    """A checked safetensors file, memory-mapped; tensors are read when asked for."""

    def __init__(self, path: Path, entries: Mapping[str, TensorEntry]) -> None:
        self.path = path
        self.entries = entries
        try:
            self._handle = safe_open(str(path), framework="pt")
        except Exception as error:  # SafetensorError is no public name in all supported versions
            raise InvalidHeaderError(f"{path} is no safetensors file: {error}") from error

    def read(self, name: str) -> Tensor:
        """A copy of the tensor `name`, in its stored dtype, on the CPU."""
        tensor: Tensor = self._handle.get_tensor(name)
        return tensor.clone()  # the mapping itself is shared by all reads of this name
