"""Progress of long work: a small protocol, silent by default, drawn with rich on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichBars

Item = TypeVar("Item")


class Progress(Protocol):
    """What long-running functions report to."""

    def track(
        self, items: Iterable[Item], description: str, total: int | None = None
    ) -> Iterator[Item]:
        """Yield `items`, showing how many of `total` are done and the time left."""

    def say(self, message: str) -> None:
        """Report one finished fact (a figure, a file written)."""


class Silent:
    """Reports nothing: the default for library calls."""

    def track(
        self, items: Iterable[Item], description: str, total: int | None = None
    ) -> Iterator[Item]:
        yield from items

    def say(self, message: str) -> None:
        return None


class Terminal(AbstractContextManager["Terminal"]):
    """Progress bars with ETA on stderr; plain lines where stderr is no terminal.

    `verbosity`: 0 is silent but for errors, 1 shows bars and facts, 2 adds details.
    """

    def __init__(self, verbosity: int = 1) -> None:
        self.verbosity = verbosity
        self.console = Console(stderr=True, highlight=False, quiet=verbosity == 0)
        self._bars = RichBars(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=False,
            disable=verbosity == 0 or not self.console.is_terminal,
        )

    def __enter__(self) -> Terminal:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def track(
        self, items: Iterable[Item], description: str, total: int | None = None
    ) -> Iterator[Item]:
        if not self.console.is_terminal:
            self.say(f"{description} …")
        task = self._bars.add_task(description, total=total)
        yield from self._bars.track(items, task_id=task, total=total)

    def say(self, message: str) -> None:
        # messages hold paths and shapes: brackets are no markup, and lines must not be broken
        self.console.print(message, markup=False, soft_wrap=True)

    def detail(self, message: str) -> None:
        """Shown only with -v."""
        if self.verbosity > 1:
            self.console.print(message, style="dim", markup=False, soft_wrap=True)
