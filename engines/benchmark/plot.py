"""The plot beside the JSON: latency with its spread, peak memory and file size by target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...files import atomic_path
from .results import BenchmarkResults, Row
from .table import three_digits

_COLORS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c")
_GROUP_WIDTH = 0.8


def write_plot(results: BenchmarkResults, path: Path) -> None:
    """Write an SVG (or what the suffix says): bars by target, grouped by batch size.

    Whiskers on latency span the fastest and the slowest run. Failed targets have no bar.
    """
    # the object interface: no window system, no global state
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    batches = sorted({row.batch for row in results.rows})
    targets = list(dict.fromkeys(row.target for row in results.rows))
    with rc_context({"svg.hashsalt": "qdit", "font.size": 9}):
        figure = Figure(figsize=(4.2 + 1.2 * len(batches) * len(targets) / 2, 6.5))
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, 1, sharex=True)
        _latency_bars(axes[0], results, batches, targets)
        _bars(axes[1], results, batches, targets, _gigabytes)
        axes[0].set_ylabel("latency of one call, ms")
        axes[1].set_ylabel("peak memory, GB")
        axes[1].set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
        model = results.settings.get("model", "")
        bits = results.settings.get("plan", {}).get("bits", "")
        figure.suptitle(f"{model} {bits}\n{results.machine['summary']}", fontsize=10)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False)
        figure.tight_layout(rect=(0, 0.06, 1, 1))
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:], metadata=_no_date(path), dpi=150)


def _no_date(path: Path) -> dict[str, Any]:
    return {"Date": None} if path.suffix == ".svg" else {}


def _gigabytes(row: Row) -> float | None:
    return None if row.peak_memory_bytes is None else row.peak_memory_bytes / 1e9


def _median(row: Row) -> float | None:
    return None if row.latency is None else row.latency.median


def _latency_bars(
    axes: Any, results: BenchmarkResults, batches: list[int], targets: list[str]
) -> None:
    for row, position, label in _bars(axes, results, batches, targets, _median):
        if row.latency is not None:
            low = row.latency.median - row.latency.min
            high = row.latency.max - row.latency.median
            axes.errorbar(
                position, row.latency.median, [[low], [high]], color="black", lw=1, capsize=2
            )
            label.xy = (position, row.latency.max)  # clear of the whisker


def _bars(
    axes: Any,
    results: BenchmarkResults,
    batches: list[int],
    targets: list[str],
    value_of: Callable[[Row], float | None],
) -> list[tuple[Row, float, Any]]:
    """Draw one bar a row that has a value; returns the rows with positions and value labels."""
    width = _GROUP_WIDTH / len(targets)
    drawn = []
    for index, target in enumerate(targets):
        offset = (index - (len(targets) - 1) / 2) * width
        found = [(row, value_of(row)) for row in results.rows if row.target == target]
        points = [
            (row, batches.index(row.batch) + offset, value)
            for row, value in found
            if value is not None
        ]
        bars = axes.bar(
            [position for _, position, _ in points],
            [value for _, _, value in points],
            width * 0.92,
            color=_COLORS[index % len(_COLORS)],
            label=target,
        )
        texts = [three_digits(value) for _, _, value in points]
        labels = axes.bar_label(bars, labels=texts, padding=2, fontsize=7)
        drawn += [
            (row, position, label) for (row, position, _), label in zip(points, labels, strict=True)
        ]
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    return drawn
