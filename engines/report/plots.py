"""The report's figures, from report.json's figures alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import numbers
from .schema import PairEntry, Report
from .svg import ALARM, FIRST, GRID, INK, MUTED, PAPER, SECOND, THIRD, Picture, picture

_SIMULATION = "simulation vs full precision"
_ENGINE = "engine vs simulation"
# Rows beyond this many are too many for a number in each cell.
MOST_LABELLED_BLOCKS = 14


def all_plots(report: Report) -> dict[str, Picture]:
    """Every figure that this report has data for, by name."""
    made = {
        "timesteps": timestep_plot(report),
        "blocks": block_plot(report),
        "sizes": size_plot(report),
        "layers": layer_plot(report),
        "fid": fid_plot(report),
        "timings": timing_plot(report),
    }
    return {name: found for name, found in made.items() if found is not None}


def timestep_plot(report: Report) -> Picture | None:
    """Relative error of the predicted noise along the trajectory, noise at the left."""
    entries = report.parity.timesteps
    if not entries:
        return None
    alt = (
        f"Relative error of the predicted noise at {len(entries)} timesteps, from noise (left) to "
        f"image (right). {_range_text(entries)}"
    )

    def draw(figure: Any, narrow: bool) -> None:
        axes = figure.subplots()
        _pair_lines(axes, [entry.timestep for entry in entries], entries)
        axes.invert_xaxis()
        axes.set_xlabel("timestep (noise → image)")
        legend(figure, axes)

    return picture("timesteps", alt, 290, draw)


def block_plot(report: Report) -> Picture | None:
    """Relative error of each block's output, the same model input for all."""
    entries = report.parity.blocks
    if not entries:
        return None
    alt = f"Relative error after each of {len(entries)} blocks. {_range_text(entries)}"

    def draw(figure: Any, narrow: bool) -> None:
        axes = figure.subplots()
        _pair_lines(axes, [entry.block for entry in entries], entries)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("block")
        legend(figure, axes)

    return picture("blocks", alt, 290, draw)


def size_plot(report: Report) -> Picture:
    """Bytes of both models, stacked by what they are made of."""
    sizes, bits = report.sizes, report.plan.bits
    linears = sizes.full_precision_fp16_linears_bytes
    full = [("linears", linears), ("rest", sizes.full_precision_fp16_bytes - linears)]
    parts = sizes.parts
    quantized = [
        ("linears", parts.integers_bytes),
        ("scales", parts.scales_and_zero_points_bytes),
        ("rest", parts.untouched_parameters_bytes),
    ]
    alt = (
        f"Full precision in float16: {numbers.byte_size(sizes.full_precision_fp16_bytes)}. "
        f"Quantized: {numbers.byte_size(sizes.quantized_bytes)}, of which "
        f"{numbers.byte_size(parts.integers_bytes)} integers, "
        f"{numbers.byte_size(parts.scales_and_zero_points_bytes)} scales and zero points, "
        f"{numbers.byte_size(parts.untouched_parameters_bytes)} untouched parameters."
    )

    def draw(figure: Any, narrow: bool) -> None:
        axes = figure.subplots()
        _stack(axes, 1, full)
        _stack(axes, 0, quantized)
        axes.set_yticks([1, 0], ["float16", bits])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_xlabel("MB")
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.2)
        axes.set_xlim(left=0)
        names = {"linears": "quantized linears", "scales": "scales", "rest": "everything else"}
        handles = [swatch(_PART_COLORS[part]) for part in names]
        legend(figure, axes, handles, list(names.values()), columns=1 if narrow else 3)

    return picture("sizes", alt, 200, draw)


def layer_plot(report: Report) -> Picture | None:
    """A heat map, block by linear: the relative output error that quantizing one linear causes.

    Falls back on the weight error where calibration saw no inputs; None where it has neither.
    """
    kind, values = layer_errors(report)
    if not values:
        return None
    blocks = sorted({block for block, _ in values})
    names = list(dict.fromkeys(name for _, name in values))
    largest = max(values, key=lambda key: values[key])
    alt = (
        f"Relative {kind} error of each quantized linear, block by block. The largest is "
        f"{numbers.error(values[largest])} at {largest[1]} of block {largest[0]}."
    )

    def draw(figure: Any, narrow: bool) -> None:
        axes = figure.subplots()
        _heat_map(axes, blocks, names, values, labelled=len(blocks) <= MOST_LABELLED_BLOCKS)
        labels = [name.replace(" ", "\n") for name in names] if narrow else names
        axes.set_xticks(range(len(names)), labels)
        axes.set_yticks(range(len(blocks)), [str(block) for block in blocks])
        axes.set_ylabel("block")

    row_height = 26 if len(blocks) <= MOST_LABELLED_BLOCKS else 16
    return picture("layers", alt, 70 + row_height * len(blocks), draw)


def layer_errors(report: Report) -> tuple[str, dict[tuple[int, str], float]]:
    """('output' or 'weight', relative errors by block and linear): what the heat map shows."""
    layers = report.plan.layers
    kind = "output" if any(layer.output_error is not None for layer in layers) else "weight"
    found = {
        (layer.block, short_name(layer.name)): getattr(layer, f"{kind}_error") for layer in layers
    }
    return kind, {key: value for key, value in found.items() if value is not None}


def fid_plot(report: Report) -> Picture | None:
    """The FID difference with its interval, beside zero and the gate's limit."""
    fid = report.parity.fid
    if fid is None:
        return None
    low, high = fid.difference_ci95
    passed = low <= fid.max_increase
    alt = (
        f"FID difference {numbers.signed(fid.difference)}, 95 % interval from "
        f"{numbers.signed(low)} to {numbers.signed(high)}; the gate fails above "
        f"{numbers.signed(fid.max_increase)}."
    )

    def draw(figure: Any, narrow: bool) -> None:
        axes = figure.subplots()
        color = FIRST if passed else ALARM
        axes.axvline(0, color=MUTED, lw=1)
        axes.axvline(fid.max_increase, color=ALARM, lw=1.5, ls=(0, (4, 3)))
        axes.plot([low, high], [0, 0], color=color, lw=5, solid_capstyle="round")
        axes.plot([fid.difference], [0], "o", color=color, ms=11)
        axes.set_ylim(-1, 1)
        axes.set_yticks([])
        axes.margins(x=0.12)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("FID quantized − FID full precision")
        top = axes.get_xaxis_transform()
        axes.text(0, 1.04, "equal", transform=top, ha="center", color=MUTED)
        axes.text(fid.max_increase, 1.04, "limit", transform=top, ha="center", color=ALARM)
        label = numbers.signed(fid.difference)
        box = {"fc": PAPER, "ec": "none", "pad": 2}
        axes.text(fid.difference, 0.3, label, ha="center", fontweight="bold", bbox=box)

    return picture("fid", alt, 170, draw)


def timing_plot(report: Report) -> Picture | None:
    """Seconds of each step of the job."""
    timings = {step: value for step, value in report.timings_s.items() if value > 0}
    if not timings:
        return None
    steps = list(timings)
    alt = "Time by step: " + ", ".join(f"{s} {numbers.seconds(timings[s])}" for s in steps) + "."

    def draw(figure: Any, narrow: bool) -> None:
        axes = figure.subplots()
        positions = range(len(steps) - 1, -1, -1)
        bars = axes.barh(list(positions), list(timings.values()), 0.62, color=FIRST)
        axes.bar_label(
            bars, [numbers.seconds(value) for value in timings.values()], padding=4, color=INK
        )
        axes.set_yticks(list(positions), steps)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_xlabel("seconds")
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.25)

    return picture("timings", alt, 60 + 30 * len(steps), draw)


_PART_COLORS = {"linears": FIRST, "scales": THIRD, "rest": SECOND}


def _pair_lines(axes: Any, positions: Sequence[float], entries: Sequence[PairEntry]) -> None:
    """Both errors over `positions` on a logarithmic axis; zeros and missing ones leave gaps."""
    marker = "o" if len(entries) <= 30 else ""
    for key, label, color in (
        ("simulation_vs_full_precision", _SIMULATION, FIRST),
        ("engine_vs_simulation", _ENGINE, SECOND),
    ):
        values = [getattr(entry, key) or float("nan") for entry in entries]
        if any(value == value for value in values):
            axes.plot(positions, values, color=color, marker=marker, label=label)
    axes.set_yscale("log")
    axes.set_ylabel("relative error")


def legend(
    figure: Any,
    axes: Any,
    handles: list[Any] | None = None,
    labels: list[str] | None = None,
    columns: int = 1,
) -> None:
    if handles is None:
        handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles,
            labels,
            loc="outside upper left",
            ncols=columns,
            labelcolor=INK,
            handlelength=1.2,
            columnspacing=1.4,
            borderpad=0.1,
        )


def swatch(color: str | tuple[str, float]) -> Any:
    """A legend's square of a colour, or of (colour, opacity)."""
    from matplotlib.patches import Patch

    return Patch(facecolor=color)


def _stack(axes: Any, row: int, parts: list[tuple[str, int]]) -> None:
    left = 0.0
    for part, size in parts:
        axes.barh(row, size / 1e6, 0.55, left=left, color=_PART_COLORS[part])
        left += size / 1e6
    axes.annotate(
        numbers.byte_size(left * 1e6), (left, row), (5, 0), textcoords="offset points", va="center"
    )


def _heat_map(
    axes: Any,
    blocks: list[int],
    names: list[str],
    values: dict[tuple[int, str], float],
    *,
    labelled: bool,
) -> None:
    from matplotlib.patches import Rectangle

    largest = max(values.values()) or 1.0
    places = 2 if largest < 0.01 else 1 if largest < 1 else 0
    for row, block in enumerate(blocks):
        for column, name in enumerate(names):
            value = values.get((block, name))
            if value is None:
                continue
            # the page's background shows through: small errors are pale in light and dark alike
            corner = (column - 0.47, row - 0.45)
            axes.add_patch(
                Rectangle(corner, 0.94, 0.9, fc=(FIRST, 0.07 + 0.58 * value / largest), ec="none")
            )
            if labelled:
                text = f"{100 * value:.{places}f}"
                axes.text(column, row, text, ha="center", va="center", fontsize=10)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(len(blocks) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, color=GRID, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)


def short_name(name: str) -> str:
    """'transformer_blocks.3.attn1.to_out.0' → 'to_out', 'ff.net.0.proj' → 'mlp in'."""
    tail = name.split(".", 2)[-1]
    known = {"ff.net.0.proj": "mlp in", "ff.net.2": "mlp out", "norm1.linear": "adaLN"}
    if tail in known:
        return known[tail]
    parts = [part for part in tail.split(".") if not part.isdigit()]
    return parts[-1].removeprefix("to_")


def _range_text(entries: Sequence[PairEntry]) -> str:
    texts = []
    for key, label in (
        ("simulation_vs_full_precision", _SIMULATION),
        ("engine_vs_simulation", _ENGINE),
    ):
        values = [value for entry in entries if (value := getattr(entry, key)) is not None]
        if values:
            low, high = numbers.error(min(values)), numbers.error(max(values))
            texts.append(f"{label[0].upper()}{label[1:]}: {low} to {high}.")
    return " ".join(texts)
