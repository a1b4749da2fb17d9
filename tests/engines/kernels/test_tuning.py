"""Tiles from tables: the nearest measurement, the rule where there is none, and damaged files."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from qdit.engines.kernels import tuning
from qdit.engines.kernels.tuning import (
    Shape,
    candidates,
    forget_tables,
    kind_key,
    own_table,
    read_table,
    rule_of_thumb,
    tile_for,
    write_table,
)
from qdit.engines.kernels.variants import LinearKind, Tile, tile_problem
from qdit.errors import ArtifactError

from .conftest import SCHEMES, FakeGpu

KIND = LinearKind.of(SCHEMES["w4 g128"], 1152)


GPU = FakeGpu()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("QDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "_SHIPPED", tmp_path / "shipped")
    forget_tables()
    yield
    forget_tables()


def keep(path: Path, **tiles: Tile) -> None:
    """Tiles of 1152 → 3456 by row count, 'rows4096=…'."""
    entries = {
        Shape(kind_key(KIND), int(name.removeprefix("rows")), 3456): (tile, 1.0)
        for name, tile in tiles.items()
    }
    write_table(path, GPU.name, entries)


def test_the_nearest_measured_row_count_decides() -> None:
    keep(own_table(GPU), rows512=Tile(48), rows4096=Tile(96), rows16384=Tile(128))
    assert tile_for(KIND, 4096, 3456, GPU) == Tile(96)
    assert tile_for(KIND, 5000, 3456, GPU) == Tile(96)
    assert tile_for(KIND, 12000, 3456, GPU) == Tile(128)
    assert tile_for(KIND, 300, 3456, GPU) == Tile(48)


def test_without_a_near_measurement_the_rule_chooses_and_the_log_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    keep(own_table(GPU), rows16384=Tile(128))
    with caplog.at_level(logging.WARNING, "qdit.kernels"):
        for _ in range(2):
            assert tile_for(KIND, 512, 3456, GPU) == rule_of_thumb(KIND, 512, 3456, GPU)
    (record,) = caplog.records
    assert "no tuned tile for 512 rows × 3456 channels" in record.message
    assert "qdit-tune" in record.message


def test_another_kind_of_product_has_its_own_tiles() -> None:
    keep(own_table(GPU), rows4096=Tile(48))
    other = LinearKind.of(SCHEMES["w8 g128"], 1152)
    assert tile_for(other, 4096, 3456, GPU) == rule_of_thumb(other, 4096, 3456, GPU)


def test_own_measurements_come_before_the_shipped_table() -> None:
    keep(tuning._SHIPPED / "sm_90a.json", rows512=Tile(64), rows4096=Tile(64))
    keep(own_table(GPU), rows4096=Tile(96))
    assert tile_for(KIND, 4096, 3456, GPU) == Tile(96)
    assert tile_for(KIND, 512, 3456, GPU) == Tile(64)


def test_a_measured_tile_that_no_longer_fits_is_passed_over() -> None:
    keep(own_table(GPU), rows4096=Tile(256))
    assert tile_problem(KIND, Tile(256), GPU) is not None
    assert tile_for(KIND, 4096, 3456, GPU) == rule_of_thumb(KIND, 4096, 3456, GPU)


@pytest.mark.parametrize(
    ("rows", "channels", "largest"), [(1, 1152, 16 * 64), (16, 1152, 16 * 64), (512, 1152, 80 * 64)]
)
def test_the_rule_does_not_waste_a_large_tile_on_few_rows(
    rows: int, channels: int, largest: int
) -> None:
    tile = rule_of_thumb(KIND, rows, channels, GPU)
    assert tile.tokens * tile.channels <= largest


def test_the_rule_takes_large_tiles_for_many_rows() -> None:
    tile = rule_of_thumb(KIND, 16384, 4608, GPU)
    assert tile.tokens * tile.channels >= 128 * 128


def test_every_candidate_fits() -> None:
    tiles = list(candidates(KIND, GPU))
    assert len(set(tiles)) == len(tiles) > 20
    assert all(tile_problem(KIND, tile, GPU) is None for tile in tiles)


def test_a_table_is_read_as_it_was_written_and_keeps_other_shapes(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    keep(path, rows512=Tile(48, 3, 5, 2), rows4096=Tile(96))
    keep(path, rows4096=Tile(112))
    shapes = read_table(path)
    assert shapes == {
        Shape(kind_key(KIND), 512, 3456): Tile(48, 3, 5, 2),
        Shape(kind_key(KIND), 4096, 3456): Tile(112),
    }
    assert json.loads(path.read_text())["gpu"] == GPU.name


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        "{}",
        '{"version": 2, "gpu": "x", "entries": []}',
        '{"version": 1, "gpu": "x", "entries": [{"kind": "k"}]}',
        '{"version": 1, "gpu": "x", "entries": [{"kind": "k", "rows": 1, "channels": 1, '
        '"tile": {"tokens": 9}}]}',
        '{"version": 1, "gpu": "x", "entries": [{"kind": "k", "rows": 1, "channels": 1, '
        '"tile": {"colour": 9}}]}',
    ],
)
def test_a_damaged_table_is_refused_and_one_s_own_is_passed_over(
    text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = own_table(GPU)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ArtifactError, match="is not a readable table of tiles"):
        read_table(path)
    assert tile_for(KIND, 4096, 3456, GPU) == rule_of_thumb(KIND, 4096, 3456, GPU)
    assert "is not a readable table" in caplog.text


def test_shipped_tables_are_readable_and_their_tiles_are_tiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Path(tuning.__file__).parent / "tiles"
    tables = sorted(folder.glob("*.json"))
    assert [table.name for table in tables] == ["sm_90a.json"]
    assert read_table(tables[0])
