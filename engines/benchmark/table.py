"""The printed table: every figure beside its ratio to the first target."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.table import Table

from ..consoles import table_console
from .results import BenchmarkResults, Row

_ABSENT = "–"
_FIGURES = ("median ms", "min … max", "runs", "images/s", "speed", "peak memory", "files")


def print_results(results: BenchmarkResults) -> None:
    """Print table and failures to stdout, at full width where no terminal limits it."""
    console = table_console()
    console.print(results_table(results))
    for line in [*products(results), *failures(results)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def results_table(results: BenchmarkResults) -> Table:
    """One line a target and batch size; × columns compare with the batch's first target."""
    first = results.rows[0].target if results.rows else ""
    table = Table(
        box=SIMPLE,
        title=f"{results.settings.get('model', '')} · {results.machine['summary']}",
        caption=f"× against {first}: speed above 1 is faster; memory and size below 1 are smaller. "
        "Images/s counts one denoiser call an image.",
    )
    table.add_column("batch", justify="right")
    table.add_column("target", no_wrap=True)
    for heading in _FIGURES:
        table.add_column(heading, justify="right", no_wrap=True)
    for position, row in enumerate(results.rows):
        ends_batch = results.rows[position + 1 : position + 2] != [] and (
            results.rows[position + 1].batch != row.batch
        )
        table.add_row(*_cells(results, row), end_section=ends_batch)
    return table


def _cells(results: BenchmarkResults, row: Row) -> list[str]:
    latency = row.latency
    if latency is None:
        figures = [_ABSENT, _ABSENT, _ABSENT, _ABSENT, "failed"]
    else:
        figures = [
            three_digits(latency.median),
            f"{three_digits(latency.min)} … {three_digits(latency.max)}",
            str(latency.runs),
            f"{row.images_per_s:.3g}",
            ratio(results.speedup(row)),
        ]
    return [
        str(row.batch),
        row.target,
        *figures,
        _with_ratio(row.peak_memory_bytes, results.memory_ratio(row)),
        _with_ratio(row.file_bytes, results.size_ratio(row)),
    ]


def _with_ratio(value: int | None, compared: float | None) -> str:
    return size(value) if compared is None else f"{size(value)} {ratio(compared)}"


def products(results: BenchmarkResults) -> list[str]:
    """One line a target that has products which might be qdit's own, with what it ran by."""
    lines = {row.target: row.products for row in results.rows if row.products is not None}
    return [f"{target}: {line}" for target, line in lines.items()]


def failures(results: BenchmarkResults) -> list[str]:
    """One line a target that failed, with its first error and batch size."""
    lines: dict[str, str] = {}
    for row in results.rows:
        if row.error is not None and row.target not in lines:
            lines[row.target] = f"{row.target} failed at batch {row.batch}: {row.error}"
    return list(lines.values())


def three_digits(value: float) -> str:
    """Three significant digits, or all digits before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def ratio(value: float | None) -> str:
    """'2.35×', or a dash."""
    return _ABSENT if value is None else f"{value:.2f}×"


def size(value: int | None) -> str:
    """Bytes in MB or GB (powers of ten), or a dash."""
    if value is None:
        return _ABSENT
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"
