"""Which tile a product takes: a measured one from tables, else the one that a rule finds best.

Tables are JSON, one a GPU. One ships for Hopper (`tiles/sm_90a.json`); `qdit-tune` measures on the
machine at hand and writes its own to the user's cache, which is looked into first. Results do not
depend on the tile, but for how float32 sums are rounded where a tile shares its panels (`splits`).
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Protocol

from ...errors import ArtifactError, InputError
from ...files import cache_folder, write_json
from .variants import Limits, LinearKind, Tile, tile_problem

TABLE_VERSION = 1
_SHIPPED = Path(__file__).parent / "tiles"
_LOG = logging.getLogger("qdit.kernels")

_TOKENS = (16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256)
_STAGES = (9, 8, 6, 5, 4, 3)
# A row count within this factor of a measured one takes its tile.
_NEAR = 2.0
# What starting and ending a tile costs, in multiply-adds a k of its area: from sweeps on an H100.
_TILE_OVERHEAD = 3000


class TunedGpu(Limits, Hashable, Protocol):
    """What is asked of a GPU here (`driver.Gpu`)."""

    @property
    def name(self) -> str: ...

    @property
    def architecture(self) -> str: ...

    @property
    def multiprocessors(self) -> int: ...


@dataclass(frozen=True)
class Shape:
    """A measured product: its kind's key, rows M and output channels N."""

    kind: str
    rows: int
    channels: int


def kind_key(kind: LinearKind) -> str:
    """All of a kind that its speed depends on, as text: 'k1152 w4 s128 token channel'."""
    words = [f"k{kind.width}", f"w{kind.weight_bits}", f"s{kind.segment}"]
    flags = (
        ("token", kind.activation_group is not None),
        ("channel", kind.weight_group is not None),
        ("multiplier", kind.multiplier_group is not None),
        ("weight-zero", kind.weight_zero),
        ("input-zero", kind.input_zero),
    )
    return " ".join(words + [name for name, present in flags if present])


def tile_for(kind: LinearKind, rows: int, channels: int, gpu: TunedGpu) -> Tile:
    """The tile of the nearest measured row count, or the rule's where none is near.

    The first product of each shape without a measurement says so in the log.
    """
    return _tile_for(kind, _bucket(rows), channels, gpu)


def _bucket(rows: int) -> int:
    """Row counts that differ by less than a sixteenth are one, so that the choice can be cached."""
    step = max(16, 1 << max(0, rows.bit_length() - 5))
    return -(-rows // step) * step


@cache
def _tile_for(kind: LinearKind, rows: int, channels: int, gpu: TunedGpu) -> Tile:
    measured = {
        shape.rows: tile
        for shape, tile in _tables(gpu).items()
        if (shape.kind, shape.channels) == (kind_key(kind), channels)
    }
    near = sorted(measured, key=lambda count: abs(math.log(count / rows)))
    for count in near:
        fits = tile_problem(kind, measured[count], gpu) is None
        if fits and max(count / rows, rows / count) <= _NEAR:
            return measured[count]
    _LOG.warning(
        "no tuned tile for %s rows × %s channels of %s on %s: a rule chooses; qdit-tune measures",
        rows,
        channels,
        kind_key(kind),
        gpu.name,
    )
    return rule_of_thumb(kind, rows, channels, gpu)


def rule_of_thumb(kind: LinearKind, rows: int, channels: int, gpu: TunedGpu) -> Tile:
    """The tile of the least work in whole waves over all multiprocessors."""
    return min(candidates(kind, gpu, turns=(0,)), key=by_rule(rows, channels, gpu))


def by_rule(rows: int, channels: int, gpu: TunedGpu) -> Callable[[Tile], tuple[int, int]]:
    """What the rule sorts tiles by, the best first."""

    def work(tile: Tile) -> tuple[int, int]:
        tiles = -(-rows // tile.tokens) * -(-channels // tile.channels)
        waves = -(-tiles // gpu.multiprocessors)
        return waves * (tile.tokens * tile.channels + _TILE_OVERHEAD), -tile.tokens

    return work


def candidates(
    kind: LinearKind, limits: Limits, turns: tuple[int, ...] = (0, 1, 2)
) -> Iterator[Tile]:
    """Every tile that fits, each with as many stages as there is room for."""
    warpgroups_of = (1, 2, 3) if limits.hopper else (2, 3)
    for tokens, warpgroups, turn in product(_TOKENS, warpgroups_of, turns):
        tiles = (Tile(tokens, warpgroups, stages, turn) for stages in _STAGES)
        fitting = next((tile for tile in tiles if tile_problem(kind, tile, limits) is None), None)
        if fitting is not None:
            yield fitting


def own_table(gpu: TunedGpu) -> Path:
    """Where `qdit-tune` keeps what it measured on GPUs of this name."""
    slug = re.sub(r"[^A-Za-z0-9]+", "-", gpu.name).strip("-").lower()
    return cache_folder("tiles") / f"{slug}.json"


@cache
def _tables(gpu: TunedGpu) -> Mapping[Shape, Tile]:
    """The shipped table, with the user's own measurements in front."""
    shipped = _SHIPPED / f"{gpu.architecture}.json"
    found = read_table(shipped) if shipped.is_file() else {}
    own = own_table(gpu)
    if own.is_file():
        try:
            found = {**found, **read_table(own)}
        except ArtifactError as error:
            _LOG.warning("%s", error)
    return found


def forget_tables() -> None:
    """Read the tables again: after a measurement."""
    _tables.cache_clear()
    _tile_for.cache_clear()


def read_table(path: Path) -> dict[Shape, Tile]:
    """A table of tiles. Raises `ArtifactError` for a file that is none of this version."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if set(value) != {"version", "gpu", "entries"} or value["version"] != TABLE_VERSION:
            raise ValueError(f"it must hold version {TABLE_VERSION}, gpu and entries")
        return dict(_entry(entry) for entry in value["entries"])
    except (OSError, ValueError, TypeError, KeyError, InputError) as error:
        raise ArtifactError(
            f"{path} is not a readable table of tiles: {error}; delete it, or run qdit-tune again"
        ) from error


def _entry(entry: dict[str, Any]) -> tuple[Shape, Tile]:
    return (
        Shape(str(entry["kind"]), int(entry["rows"]), int(entry["channels"])),
        Tile(**entry["tile"]),
    )


def write_table(path: Path, gpu_name: str, tiles: Mapping[Shape, tuple[Tile, float]]) -> None:
    """Write tiles with their microseconds, atomically; what the file held of other shapes stays."""
    kept: dict[Shape, dict[str, Any]] = {}
    if path.is_file():
        read_table(path)  # a damaged file is said, not overwritten
        for entry in json.loads(path.read_text(encoding="utf-8"))["entries"]:
            kept[_entry(entry)[0]] = entry
    for shape, (tile, microseconds) in tiles.items():
        kept[shape] = {
            "kind": shape.kind,
            "rows": shape.rows,
            "channels": shape.channels,
            "tile": tile.to_json(),
            "us": round(microseconds, 2),
        }
    entries = [kept[key] for key in sorted(kept, key=lambda s: (s.kind, s.channels, s.rows))]
    write_json(path, {"version": TABLE_VERSION, "gpu": gpu_name, "entries": entries})
