"""Find and read the weight files of one diffusers component, memory-mapped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import InputError
from .weights_only import read_pickled

WEIGHTS_STEM = "diffusion_pytorch_model"
# The first that exists is read: full precision before fp16, safetensors before pickles.
_CANDIDATES = tuple(
    f"{WEIGHTS_STEM}{name}"
    for name in (
        ".safetensors",
        ".safetensors.index.json",
        ".bin",
        ".bin.index.json",
        ".fp16.safetensors",
        ".fp16.bin",
    )
)
_CHUNK = 1 << 20


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a component's weights, in name order. Raises `InputError` for none."""
    for name in _CANDIDATES:
        path = folder / name
        if path.is_file():
            return _shards(path) if name.endswith(".json") else [path]
    raise InputError(f"no weights in {folder}; expected one of {', '.join(_CANDIDATES)}")


def read_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """All tensors of `files` by name. Pages are read from disk only when used."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        part = _read_safetensors(path) if path.suffix == ".safetensors" else read_pickled(path)
        for name, value in part.items():
            if not isinstance(value, Tensor):
                raise InputError(f"{name} must be a tensor, got {type(value).__name__} in {path}")
            if name in tensors:
                raise InputError(f"tensor {name} appears in two files; the second is {path}")
            tensors[name] = value
    return tensors


def sha256_of_files(files: Iterable[Path]) -> str:
    """Hex SHA-256 over the files' bytes one after another: `cat FILES | sha256sum`."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as handle:
            while chunk := handle.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `InputError`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no {path.name} in {path.parent}; is it a diffusers folder?") from error
    except (OSError, ValueError) as error:  # ValueError: bad JSON and bad UTF-8
        raise InputError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _shards(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise InputError(f"{index} must have a 'weight_map' of tensor names to file names")
    shards = []
    for name in sorted({str(value) for value in names.values()}):
        if Path(name).name != name:  # no way out of the folder
            raise InputError(f"{index} names {name!r}; shards must lie beside the index")
        if not (index.parent / name).is_file():
            raise InputError(f"{index} names {name}, which is missing; download it too")
        shards.append(index.parent / name)
    return shards


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  no dict
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}") from error
