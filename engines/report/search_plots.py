"""The figures of a granularity search, from report.json's figures alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from . import numbers
from .plots import legend
from .schema import Report
from .search_group_plot import group_plot
from .search_schema import SearchEntry
from .search_text import cost_scale, cost_text
from .svg import FIRST, MUTED, SECOND, THIRD, Picture, picture

# (cost, PSNR) of a plan, either null
_Point = tuple[float | None, float | None]
# label, colour, marker, points
_Series = tuple[str, str, str, list[_Point]]


def search_plots(report: Report) -> dict[str, Picture]:
    """Every figure of the search section that there is data for, by name; none without a search."""
    if report.search is None:
        return {}
    made = {
        "groups": group_plot(report.plan.layers),
        "front": front_plot(report.search),
        "history": history_plot(report.search),
    }
    return {name: found for name, found in made.items() if found is not None}


def front_plot(search: SearchEntry) -> Picture | None:
    """Cost against PSNR: the front, the uniform plans and the chosen one, predicted and measured.

    Filled marks are predicted, hollow ones measured. None without a single pair of figures.
    """
    uniform, chosen = search.uniform, search.chosen
    others = [plan for plan in search.candidates if not plan.chosen]
    front = _pairs((point.cost, point.predicted_psnr_db) for point in search.front)
    predicted: list[_Series] = [
        ("uniform plans", SECOND, "s", [(p.cost, p.predicted_psnr_db) for p in uniform]),
        ("chosen plan", THIRD, "D", [(search.cost, search.predicted_psnr_db)]),
    ]
    measured: list[_Series] = [
        ("uniform plans, measured", SECOND, "s", [(p.cost, p.psnr_db) for p in uniform]),
        ("candidates, measured", FIRST, "o", [(p.cost, p.psnr_db) for p in others]),
        ("chosen plan, measured", THIRD, "D", [(p.cost, p.psnr_db) for p in [chosen] if p]),
    ]
    drawn = [series for series in (*predicted, *measured) if _pairs(series[3])]
    if not front and not drawn:
        return None
    divisor, unit = cost_scale(search.budget)

    def draw(figure: Any, narrow: bool) -> None:
        axes = figure.subplots()
        if front:
            costs, values = zip(*front, strict=True)
            scaled = [cost / divisor for cost in costs]
            axes.plot(scaled, values, color=FIRST, marker="o", label="front", zorder=2)
        axes.axvline(search.budget.value / divisor, color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
        for label, color, marker, points in drawn:
            face = "none" if "measured" in label else color
            costs, values = zip(*_pairs(points), strict=True)
            axes.plot(
                [cost / divisor for cost in costs],
                values,
                marker,
                mec=color,
                mfc=face,
                mew=1.8,
                ms=9 if marker == "D" else 8,
                label=label,
                zorder=4 if marker == "D" else 3,
            )
        _name_uniform(axes, search, divisor)
        axes.annotate(
            "budget",
            (search.budget.value / divisor, 1.01),
            xycoords=axes.get_xaxis_transform(),
            ha="center",
            va="bottom",
            color=MUTED,
            fontsize=10,
        )
        axes.margins(0.1)
        axes.set_xlabel(unit)
        axes.set_ylabel("PSNR, dB")
        legend(figure, axes, columns=2)

    return picture("front", _front_alt(search), 340, draw)


def history_plot(search: SearchEntry) -> Picture | None:
    """Best FID so far against the time of all evaluations, generation by generation."""
    entries = [entry for entry in search.history if entry.best_fid is not None]
    if not entries:
        return None
    last = entries[-1]
    divisor, unit = _time_scale(last.seconds)
    alt = (
        f"Best FID over {len(entries)} generations: {numbers.plain(entries[0].best_fid)} after "
        f"{numbers.seconds(entries[0].seconds)}, {numbers.plain(last.best_fid)} after "
        f"{numbers.seconds(last.seconds)} and {numbers.count(last.evaluated)} candidates."
    )

    def draw(figure: Any, narrow: bool) -> None:
        axes = figure.subplots()
        times = [entry.seconds / divisor for entry in entries]
        values = [entry.best_fid for entry in entries]
        axes.step(times, values, where="post", color=FIRST, marker="o")
        axes.set_xlim(left=0)
        axes.margins(0.08)
        axes.set_xlabel(unit)
        axes.set_ylabel("best FID")

    return picture("history", alt, 340, draw)


def _pairs(points: Iterable[_Point]) -> list[tuple[float, float]]:
    """The points that have both figures."""
    return [(x, y) for x, y in points if x is not None and y is not None]


def _name_uniform(axes: Any, search: SearchEntry, divisor: float) -> None:
    """'g64' beside each uniform plan, at its predicted point or else the measured one."""
    for plan in search.uniform:
        value = plan.psnr_db if plan.predicted_psnr_db is None else plan.predicted_psnr_db
        if plan.cost is None or value is None:
            continue
        name = plan.group if plan.group == "channel" else f"g{plan.group}"
        place = {"textcoords": "offset points", "va": "top", "fontsize": 10}
        axes.annotate(name, (plan.cost / divisor, value), (7, -4), **place)


def _time_scale(seconds: float) -> tuple[float, str]:
    if seconds < 300:
        return 1, "seconds"
    return (60, "minutes") if seconds < 7200 else (3600, "hours")


def _front_alt(search: SearchEntry) -> str:
    chosen = (
        f"The chosen plan: {cost_text(search.cost, search.budget)}, "
        f"predicted {numbers.decibel(search.predicted_psnr_db)}."
    )
    front = _pairs((point.cost, point.predicted_psnr_db) for point in search.front)
    if not front:
        return f"Cost against PSNR. {chosen}"
    (low, worst), (high, best) = front[0], front[-1]
    return (
        f"Pareto front of {len(front)} plans, from {cost_text(low, search.budget)} at predicted "
        f"{numbers.decibel(worst)} to {cost_text(high, search.budget)} at "
        f"{numbers.decibel(best)}. {chosen}"
    )
