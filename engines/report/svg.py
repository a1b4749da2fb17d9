"""Matplotlib figures as inline SVG that follows the page's colours, light or dark.

A figure is drawn in stand-in colours, one for each role; in the SVG text these become CSS
variables. Text stays text, in the page's own font.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# Stand-ins: colours that nothing else in a figure uses → the page's variables (report.css).
INK, MUTED, GRID = "#010203", "#020304", "#030405"
FIRST, SECOND, THIRD, ALARM, PAPER = "#040506", "#050607", "#060708", "#070809", "#08090a"
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--line",
    FIRST: "--first",
    SECOND: "--second",
    THIRD: "--third",
    ALARM: "--bad",
    PAPER: "--paper",
}
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.labelsize": 11,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 11,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "lines.markersize": 4,
    "axes.unicode_minus": True,
}
# Points and CSS pixels are one here: the page shows a figure at about this width. FULL spans both
# columns of charts.
WIDE, NARROW, FULL = 520, 340, 1072


@dataclass(frozen=True)
class Picture:
    """One figure, drawn twice: for a desktop column and for a phone. `alt` says what it shows."""

    wide: str
    narrow: str
    alt: str


Draw = Callable[[Any, bool], None]


def picture(
    name: str,
    alt: str,
    height: float,
    draw: Draw,
    *,
    width: float = WIDE,
    narrow_height: float | None = None,
) -> Picture:
    """Draw a figure by `draw(figure, narrow)`, `height` pixels high.

    `width` is that of the wide drawing; `narrow_height` is the phone's, by default `height`.
    Equal figures give equal text: no date in it, and element ids that depend on `name` alone.
    """
    return Picture(
        _render(f"{name}-wide", width, height, draw, narrow=False),
        _render(f"{name}-narrow", NARROW, narrow_height or height, draw, narrow=True),
        alt,
    )


def _render(salt: str, width: float, height: float, draw: Draw, *, narrow: bool) -> str:
    from matplotlib.figure import Figure  # the object interface: no window system, no global state

    with _style(salt):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        figure.patch.set_alpha(0)
        draw(figure, narrow)
        for axes in figure.axes:
            axes.patch.set_alpha(0)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), salt)


@contextmanager
def _style(salt: str) -> Iterator[None]:
    from matplotlib import rc_context

    with rc_context(_STYLE | {"svg.hashsalt": salt}):
        yield


def _inline(text: str, salt: str) -> str:
    """The <svg> element alone, sized by the page, with variables for colours and unique ids."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    # ids are alike in every figure: prefixed, with what refers to them, they are unique in a page
    text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{salt}-", text)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, f"var({variable})")
    return text.strip()
