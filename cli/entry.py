"""A command as a console entry: errors become one line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import typer
from rich.console import Console

from ..errors import QditError

GATE_FAILED = 3  # the exit code of an export whose proof did not hold


def console_entry(command: Callable[..., int]) -> Callable[[], None]:
    """A function for `[project.scripts]`: it parses the flags, runs `command`, and exits.

    The flags are the parameters of `command`, the help is its docstring. Exit codes: the
    command's own; that of a `QditError`; 2 for usage errors; 130 for interruptions.
    """
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(_told_of_interruptions(command))

    def entry() -> None:
        try:
            code = app(standalone_mode=False)
        except QditError as error:
            _fail(str(error))
            sys.exit(error.exit_code)
        except typer.Abort:
            sys.exit(130)
        except _InterruptedError:
            _fail("interrupted; run the same command again to go on")
            sys.exit(130)
        except Exception as error:
            if not hasattr(error, "exit_code") or not hasattr(error, "format_message"):
                raise
            _fail(error.format_message())  # click's own usage errors
            sys.exit(2)
        sys.exit(code or 0)

    return entry


class _InterruptedError(Exception):
    """Ctrl-C. Typer ends a program on a `KeyboardInterrupt` itself, without a word."""


def _told_of_interruptions(command: Callable[..., int]) -> Callable[..., int]:
    @wraps(command)
    def run(*arguments: object, **options: object) -> int:
        try:
            return command(*arguments, **options)
        except KeyboardInterrupt as error:
            raise _InterruptedError from error

    return run


def command_line() -> str:
    """The command as it was typed, for reports."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _fail(message: str) -> None:
    Console(stderr=True, highlight=False).print(f"error: {message}", markup=False, soft_wrap=True)
