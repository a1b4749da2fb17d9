"""Atomic writes, hashes and the cache: a killed process leaves the old file or the new one."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CACHE_VARIABLE = "QDIT_CACHE"
_CHUNK = 1 << 20


def cache_folder(name: str) -> Path:
    """The folder `name` of what may be made again: in `$QDIT_CACHE`, by default `~/.cache/qdit`."""
    root = os.environ.get(CACHE_VARIABLE)
    return (Path(root) if root else Path.home() / ".cache" / "qdit") / name


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; it replaces `target` when the block succeeds.

    On an error nothing is left behind. The data is flushed to disk before the rename.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # a thread's own: two may make the same thing at once, as kernels are compiled
    owner = f"{os.getpid()}-{threading.get_ident()}"
    temporary = target.with_name(f".{target.name}.{owner}.partial")
    try:
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and fixed separators: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(target: Path, value: Any) -> None:
    """Write canonical JSON, atomically."""
    write_text(target, canonical_json(value))


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    """Hex SHA-256 of a value's canonical JSON: the key under which finished steps are reused."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()
