"""Profiles for people: a table a batch size, and a plot of stacked bars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from ...files import atomic_path
from ..consoles import table_console
from .operator_times import OperatorTime
from .results import BenchmarkResults, Row
from .table import three_digits

_MOST_KINDS = 8  # of a target; the rest is one line
OTHER = "other operators"


def print_profiles(results: BenchmarkResults) -> None:
    """One table a target and batch size that has a profile, and a line for those without."""
    console = table_console()
    for row in results.rows:
        if row.profile:
            console.print(profile_table(row))
        elif row.latency is not None:
            console.print(f"{row.target}: its runtime gives no profile", markup=False)


def profile_table(row: Row) -> Table:
    """Milliseconds and share of each kind of operator, longest first."""
    times = most_of(row.profile or [])
    total = sum(entry.ms for entry in times)
    table = Table(box=SIMPLE, title=f"{row.target}, batch {row.batch}: {three_digits(total)} ms")
    table.add_column("operator", no_wrap=True)
    for heading in ("nodes", "ms", "share"):
        table.add_column(heading, justify="right")
    for entry in times:
        share = f"{100 * entry.ms / total:.1f} %"
        table.add_row(entry.operator, str(entry.count), three_digits(entry.ms), share)
    return table


def most_of(times: list[OperatorTime]) -> list[OperatorTime]:
    """The kinds that take longest, and all others as one."""
    shown, rest = times[:_MOST_KINDS], times[_MOST_KINDS:]
    if not rest:
        return shown
    other = OperatorTime(OTHER, sum(e.ms for e in rest), sum(e.count for e in rest))
    return [*shown, other]


def write_profile_plot(results: BenchmarkResults, path: Path) -> None:
    """One horizontal bar a target and batch size, cut by kind of operator."""
    from matplotlib import colormaps, rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in results.rows if row.profile]
    batches = sorted({row.batch for row in rows})
    kinds = _kinds(rows)
    colors: dict[str, Any] = {
        kind: colormaps["tab20"](index % 20) for index, kind in enumerate(kinds)
    }
    colors[OTHER] = "#eeeeee"
    with rc_context({"svg.hashsalt": "qdit", "font.size": 9}):
        figure = Figure(figsize=(9, 1.6 + 0.5 * len(rows) + 0.3 * len(kinds) / 3))
        FigureCanvasAgg(figure)
        all_axes = figure.subplots(len(batches), 1, squeeze=False)[:, 0]
        for axes, batch in zip(all_axes, batches, strict=True):
            _bars(axes, [row for row in rows if row.batch == batch], colors)
            axes.set_title(f"batch {batch}", loc="left", fontsize=9)
        all_axes[-1].set_xlabel("ms in operators, one denoiser call")
        figure.suptitle(f"{results.settings.get('model', '')} · {results.machine['summary']}")
        handles = [_patch(colors[kind], kind) for kind in kinds]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
        figure.tight_layout(rect=(0, 0.06 + 0.05 * (len(kinds) / 3) / len(batches), 1, 1))
        with atomic_path(path) as temporary:
            metadata: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {}
            figure.savefig(temporary, format=path.suffix[1:], metadata=metadata, dpi=150)


def _kinds(rows: list[Row]) -> list[str]:
    """Every kind that a bar shows, once, 'other' last."""
    found = dict.fromkeys(entry.operator for row in rows for entry in most_of(row.profile or []))
    return [kind for kind in found if kind != OTHER] + ([OTHER] if OTHER in found else [])


def _bars(axes: Any, rows: list[Row], colors: dict[str, Any]) -> None:
    for position, row in enumerate(rows):
        left = 0.0
        for entry in most_of(row.profile or []):
            axes.barh(position, entry.ms, left=left, color=colors[entry.operator], height=0.7)
            left += entry.ms
        axes.text(left, position, f" {three_digits(left)}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row.target for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)


def _patch(color: Any, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=color, label=label)
