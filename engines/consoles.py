"""Where tables are printed."""

from __future__ import annotations

from rich.console import Console

# Room for every column: in a pipe, where rich would take 80 columns and cut the figures off.
_WIDTH = 120


def table_console() -> Console:
    """Stdout, at full width where no terminal limits it."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)
