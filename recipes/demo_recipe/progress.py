"""Progress with an estimate of the time left: a bar on a terminal, lines in a log."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS = 15.0


class Reporter:
    """Context manager that shows how far a phase of the run is."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.console = Console()
        self.start = self.last = time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task(title, total=1.0, detail="")
        self.first: float | None = None

    def __enter__(self) -> "Reporter":
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def update(self, done: float, detail: str) -> None:
        """Show that the share ``done`` (0...1) is finished; ``detail`` is one short text."""
        if self.first is None:
            self.first = done
        if self.console.is_terminal:
            self.bar.update(self.task, completed=done, detail=detail)
        elif time.monotonic() - self.last >= LINE_SECONDS or done >= 1:
            self.last = time.monotonic()
            self._print_line(done, detail)

    def _print_line(self, done: float, detail: str) -> None:
        elapsed = time.monotonic() - self.start
        gained = done - (self.first or 0.0)
        left = f"{elapsed * (1 - done) / gained:.0f} s left" if gained > 0 else "time left unknown"
        text = f"{self.title}: {done:6.1%}  {detail}  {elapsed:.0f} s  {left}"
        self.console.print(text, highlight=False, soft_wrap=True)
