"""What the report says of integer scales: how good they are beside float scales of the same groups.

The figures are calibration's: each such linear was quantized both ways on the same inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ...calibrate.plan import LinearSpec, QuantizationPlan
from . import numbers
from .plots import short_name
from .schema import IntegerScalesEntry, LayerEntry, Report
from .svg import FIRST, INK, MUTED, Picture, picture


def integer_scales_entry(
    plan: QuantizationPlan, linears: Iterable[LinearSpec], layers: Sequence[LayerEntry]
) -> IntegerScalesEntry | None:
    """The summary over the linears that have integer scales; None where none has."""
    specs = [spec for spec in linears if plan[spec.name].has_integer_scales]
    if not specs:
        return None
    names = {spec.name for spec in specs}
    chosen = [layer for layer in layers if layer.name in names]
    floats = {spec.name: plan[spec.name].with_float_scales() for spec in specs}
    return IntegerScalesEntry(
        linears=len(specs),
        effective_weight_bits=plan.effective_weight_bits(specs),
        float_scales_effective_weight_bits=QuantizationPlan(
            plan.bits, floats
        ).effective_weight_bits(specs),
        weight_error=_root_mean_square(layer.weight_error for layer in chosen),
        float_scales_weight_error=_root_mean_square(
            layer.float_scales_weight_error for layer in chosen
        ),
        output_error=_root_mean_square(layer.output_error for layer in chosen),
        float_scales_output_error=_root_mean_square(
            layer.float_scales_output_error for layer in chosen
        ),
    )


def integer_scales_text(report: Report) -> str:
    """What integer scales are, what they save and what they cost; "" where there are none.

    A figure that is missing is left out with its sentence.
    """
    entry = report.integer_scales
    if entry is None:
        return ""
    text = (
        f"{numbers.count(entry.linears)} linears have an integer of 1 to 16 as each group’s scale "
        "and one float a channel, so that their weights are int8 with one scale a channel: "
        f"{entry.effective_weight_bits:.3f} bits a weight, where float scales of the same groups "
        f"take {entry.float_scales_effective_weight_bits:.3f}."
    )
    for what, own, other in (
        ("output error on calibration inputs", entry.output_error, entry.float_scales_output_error),
        ("weight error", entry.weight_error, entry.float_scales_weight_error),
    ):
        if own is not None and other is not None:
            text += (
                f" Their {what} (root mean square) is {numbers.error(own)}; with float scales it "
                f"would be {numbers.error(other)}."
            )
    return text


def integer_scales_plot(report: Report) -> Picture | None:
    """One mark a linear: how its error changes from float to integer scales, in percent.

    By the output's error where calibration saw inputs, else by the weight's; None without either.
    """
    kind, changes = _changes(report.plan.layers)
    if not changes:
        return None
    names = list(dict.fromkeys(name for name, _ in changes))
    values = [change for _, change in changes]
    alt = (
        f"Change of the {kind} error from float to integer scales for {len(values)} linears: from "
        f"{numbers.signed(min(values))} % to {numbers.signed(max(values))} %."
    )

    def draw(figure: Any, narrow: bool) -> None:
        axes = figure.subplots()
        axes.axvline(0, color=MUTED, lw=1)
        rows = [len(names) - 1 - names.index(name) for name, _ in changes]
        axes.plot(values, rows, "o", mfc=(FIRST, 0.35), mec=FIRST, mew=1, ms=7)
        axes.set_yticks(range(len(names)), names[::-1])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.margins(x=0.08)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"{kind} error against float scales, %")

    return picture("integer-scales", alt, 80 + 26 * len(names), draw)


def _changes(layers: Iterable[LayerEntry]) -> tuple[str, list[tuple[str, float]]]:
    """('output' or 'weight', [(linear's short name, change in percent)])."""
    for kind in ("output", "weight"):
        found = []
        for layer in layers:
            own = getattr(layer, f"{kind}_error")
            other = getattr(layer, f"float_scales_{kind}_error")
            if own is not None and other:  # an error of 0 has no ratio to it
                found.append((short_name(layer.name), 100 * (own / other - 1)))
        if found:
            return kind, found
    return "weight", []


def _root_mean_square(errors: Iterable[float | None]) -> float | None:
    """None where any is missing."""
    squares = [None if error is None else error**2 for error in errors]
    known = [square for square in squares if square is not None]
    if len(known) < len(squares):
        return None
    return math.sqrt(math.fsum(known) / len(known))
