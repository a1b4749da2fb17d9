"""Floor 5: the `qdit-*` commands, a module each: parse, call, show progress. No logic lives here.

`entry.py` runs them, `values.py` reads what was given, and `*_flags.py` hold the flags that several
commands have, or that one options model of `engines/` reads.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

# A stray `import cli` from the root fails here, at once (docs/adr/0001).
from .. import __version__ as __version__

_COMMANDS = ("bench", "export", "inspect", "serve", "tune", "validate")


def __getattr__(name: str) -> Callable[[], None]:
    """`export_command` and its like, imported when asked for: each starts without the others."""
    command = name.removesuffix("_command")
    if name == command or command not in _COMMANDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    entry: Callable[[], None] = getattr(import_module(f".{command}", __name__), name)
    return entry
