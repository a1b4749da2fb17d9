"""Atomic writes: a reader, or a run after a kill, sees the old file or the whole new one."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file or folder beside ``path``, then move it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        if temporary.is_dir() and path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda temporary: _write_utf8(temporary, text))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON with a final newline, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def _write_utf8(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
