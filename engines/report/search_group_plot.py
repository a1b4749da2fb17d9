"""The groups that a plan gives each linear, as a picture over depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from ...calibrate.plan import Role
from ...calibrate.schemes import UNQUANTIZED_BITS
from .plots import MOST_LABELLED_BLOCKS, legend, short_name, swatch
from .schema import LayerEntry
from .svg import FIRST, FULL, GRID, INK, MUTED, NARROW, PAPER, WIDE, Picture, picture

# Down the picture in the order of a block's data flow; adaLN, which feeds all of it, comes last.
_ROLES: tuple[str, ...] = get_args(Role)
_COARSEST = {"channel": "chan", "token": "tok"}
_STRONGEST, _PALEST = 1.0, 0.05
# Above this opacity the page's paper is easier to read on a cell than its ink, light and dark.
_PAPER_TEXT = 0.72
# Text of this size is about this wide a character, in pixels of the figure.
_FONT, _CHARACTER = 9, 5.4
_LABEL_WIDTH = 58


@dataclass(frozen=True)
class _Side:
    """One panel: the weights' or the activations' group of each linear."""

    name: str  # 'weight' or 'activation'
    title: str

    def group(self, layer: LayerEntry) -> int | str | None:
        """Its group; None where this side is not quantized."""
        bits = getattr(layer, f"{self.name}_bits")
        return None if bits == UNQUANTIZED_BITS else getattr(layer, f"{self.name}_group")


_SIDES = (_Side("weight", "Weight groups"), _Side("activation", "Activation groups"))


def group_plot(layers: Sequence[LayerEntry]) -> Picture | None:
    """One cell a linear, shaded by its group size, in a panel of weights and one of activations.

    Linears run down and blocks across; on a phone with many blocks it is the other way round, so
    that every cell holds its size. A side that no linear quantizes has no panel.
    """
    sides = [side for side in _SIDES if any(side.group(layer) is not None for layer in layers)]
    if not sides:
        return None
    linears, blocks = _linears(layers), sorted({layer.block for layer in layers})
    levels = _levels(layers, sides)
    shades = _shades(levels)
    width = FULL if len(blocks) > MOST_LABELLED_BLOCKS else WIDE

    def draw(figure: Any, narrow: bool) -> None:
        total = NARROW if narrow else width
        upright = narrow and _cell_width(NARROW, len(blocks)) < 4 * _CHARACTER
        columns = len(linears) if upright else len(blocks)
        room = _cell_width(total, columns)
        panels = figure.subplots(len(sides), 1, squeeze=False)[:, 0]
        for axes, side in zip(panels, sides, strict=True):
            _frame(axes, side.title, linears, blocks, upright=upright)
            for layer in layers:
                row, column = linears.index(_path(layer)), blocks.index(layer.block)
                place = (row, column) if upright else (column, row)
                _cell(axes, place, side, layer, shades, room)
        _shade_key(figure, panels[0], levels, shades, columns=5 if narrow else len(levels))

    return picture(
        "groups",
        _alt(layers, sides),
        50 + len(sides) * (44 + 22 * len(linears)),
        draw,
        width=width,
        narrow_height=70 + len(sides) * (50 + _narrow_rows(linears, blocks)),
    )


def _narrow_rows(linears: Sequence[str], blocks: Sequence[int]) -> int:
    upright = _cell_width(NARROW, len(blocks)) < 4 * _CHARACTER
    return 17 * len(blocks) if upright else 22 * len(linears)


def _cell_width(total: float, columns: int) -> float:
    return (total - _LABEL_WIDTH) / columns


def _linears(layers: Sequence[LayerEntry]) -> list[str]:
    """The linears of a block by their paths in it: by role, then in model order."""
    roles = {_path(layer): layer.role for layer in layers}
    return sorted(roles, key=lambda path: _ROLES.index(roles[path]) if roles[path] in _ROLES else 9)


def _path(layer: LayerEntry) -> str:
    """'transformer_blocks.3.attn1.to_q' → 'attn1.to_q'."""
    return layer.name.split(".", 2)[-1]


def _levels(layers: Sequence[LayerEntry], sides: Sequence[_Side]) -> list[int | str]:
    """The groups in use, finest first; 'token' and 'channel' are one level, the coarsest."""
    used = {side.group(layer) for side in sides for layer in layers} - {None}
    sizes: list[int | str] = sorted(group for group in used if isinstance(group, int))
    return sizes + (["channel"] if used - set(sizes) else [])


def _shades(levels: Sequence[int | str]) -> dict[int | str, float]:
    """Opacity of each level over the page: finest strongest, in even steps."""
    step = (_STRONGEST - _PALEST) / max(1, len(levels) - 1)
    shades = {level: _STRONGEST - step * rank for rank, level in enumerate(levels)}
    return shades | ({"token": shades["channel"]} if "channel" in shades else {})


def _frame(
    axes: Any, title: str, linears: Sequence[str], blocks: Sequence[int], *, upright: bool
) -> None:
    names = [short_name(f"..{path}") for path in linears]
    across, down = (names, blocks) if upright else (blocks, names)
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=4)
    axes.set_xticks(range(len(across)), [str(label).replace(" ", "\n") for label in across])
    axes.set_yticks(range(len(down)), [str(label) for label in down])
    axes.set_xlim(-0.5, len(across) - 0.5)
    axes.set_ylim(len(down) - 0.5, -0.5)
    if upright:
        axes.xaxis.tick_top()
        axes.set_ylabel("block")
    else:
        axes.set_xlabel("block", labelpad=1)
    axes.grid(visible=False)
    axes.tick_params(length=0, labelcolor=INK, labelsize=10)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _cell(
    axes: Any,
    place: tuple[int, int],
    side: _Side,
    layer: LayerEntry,
    shades: dict[int | str, float],
    room: float,
) -> None:
    """The linear's rectangle, found in the SVG by its id 'weight-group.NAME', and its size."""
    from matplotlib.patches import Rectangle

    column, row = place
    group = side.group(layer)
    face = "none" if group is None else (FIRST, shades[group])
    cell = Rectangle(
        (column - 0.47, row - 0.45), 0.94, 0.9, fc=face, ec=GRID, lw=0.6, clip_on=False
    )
    cell.set_gid(f"{side.name}-group.{layer.name}")
    axes.add_patch(cell)
    text = "–" if group is None else _COARSEST.get(str(group), str(group))
    if len(text) * _CHARACTER <= room:
        color = _text_color(group, shades)
        axes.text(column, row, text, ha="center", va="center", fontsize=_FONT, color=color)


def _text_color(group: int | str | None, shades: dict[int | str, float]) -> str:
    if group is None:
        return MUTED
    return PAPER if shades[group] > _PAPER_TEXT else INK


def _shade_key(
    figure: Any,
    axes: Any,
    levels: Sequence[int | str],
    shades: dict[int | str, float],
    *,
    columns: int,
) -> None:
    """The legend, read along its rows; matplotlib fills columns, so the order is turned round."""
    columns = min(columns, len(levels))
    turned = [level for start in range(columns) for level in levels[start::columns]]
    names = ["chan / tok" if level == "channel" else str(level) for level in turned]
    legend(figure, axes, [swatch((FIRST, shades[v])) for v in turned], names, columns=columns)


def _alt(layers: Sequence[LayerEntry], sides: Sequence[_Side]) -> str:
    """How many linears have each group, side by side."""
    parts = []
    for side in sides:
        groups = [group for layer in layers if (group := side.group(layer)) is not None]
        counts = {group: groups.count(group) for group in sorted(set(groups), key=_finest_first)}
        found = ", ".join(f"{group} in {count}" for group, count in counts.items())
        parts.append(f"{side.title} of {len(groups)} linears: {found}.")
    return " ".join(parts)


def _finest_first(group: int | str) -> float:
    return group if isinstance(group, int) else float("inf")
