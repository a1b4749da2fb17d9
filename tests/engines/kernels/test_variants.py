"""Which kernel a scheme takes, and what a tile needs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from qdit.calibrate.schemes import LayerScheme
from qdit.engines.kernels.variants import (
    LinearKind,
    QuantizeKind,
    Tile,
    WeightOnlyKind,
    linear_shared_bytes,
    tile_problem,
)
from qdit.errors import InputError

from .conftest import SCHEMES


@pytest.mark.parametrize(
    ("name", "segment", "token_segments", "channel_segments"),
    [
        ("w8 g128", 128, 1, 1),
        ("w4 g32", 32, 1, 1),
        ("w8 g96", 32, 3, 3),
        ("w4 g192", 64, 3, 3),
        ("w4 g288 a192", 32, 6, 9),
        ("w8 g384 a128", 128, 1, 3),
        ("w4 g128 token", 128, 9, 1),
        ("w8 channel token", 128, 9, 9),
        ("w4 g64 integer a128", 64, 2, 18),
    ],
)
def test_a_segment_ends_where_any_scale_changes(
    name: str, segment: int, token_segments: int, channel_segments: int
) -> None:
    kind = LinearKind.of(SCHEMES[name], 1152)
    assert kind.segment == segment
    assert kind.segments * segment == 1152
    assert kind.segments_of(kind.activation_group) == token_segments
    assert kind.segments_of(kind.weight_group) == channel_segments


def test_zero_points_put_both_sides_scales_into_the_loop() -> None:
    plain = LinearKind.of(LayerScheme(8, 8, "channel", "token"), 1152)
    assert (plain.weight_group, plain.activation_group) == (None, None)
    zeros = LinearKind.of(LayerScheme(8, 8, "channel", "token", weight_symmetric=False), 1152)
    assert (zeros.weight_group, zeros.activation_group) == (1152, 1152)


def test_integer_scales_are_multiplied_in_before_the_product() -> None:
    kind = LinearKind.of(SCHEMES["w4 g128 integer token"], 1152)
    assert kind.multiplier_group == 128
    assert (kind.weight_group, kind.activation_group) == (None, None)


@pytest.mark.parametrize(
    ("kind", "span_and_team", "grid"),
    [
        # 9 panels: three warps of three; 36: four each
        (QuantizeKind(1152, 128), (3, 1), (13, 3)),
        (QuantizeKind(4608, 32), (4, 1), (13, 9)),
        # a whole row a warp, four warps a row where it is long
        (QuantizeKind(1152, 1152), (9, 1), (13, 1)),
        (QuantizeKind(4608, 4608), (9, 4), (50, 1)),
        # whole groups a warp
        (QuantizeKind(1152, 384), (9, 1), (13, 1)),
        # statistics of the row, and groups by way of shared memory, need all of it
        (QuantizeKind(1152, 128, normalized=True), (9, 1), (13, 1)),
        (QuantizeKind(4608, 576), (36, 1), (13, 1)),
    ],
)
def test_how_rows_are_shared_out_to_warps(
    kind: QuantizeKind, span_and_team: tuple[int, int], grid: tuple[int, int]
) -> None:
    assert kind.span_and_team == span_and_team
    assert kind.grid(100) == grid


@dataclass(frozen=True)
class Limits:
    hopper: bool = True
    shared_bytes: int = 227 << 10


def test_shared_memory_worked_out() -> None:
    kind = LinearKind.of(LayerScheme(4, 8, 128, 128), 1152)
    # a stage: 128 channels × 64 bytes, 64 tokens × 128 bytes, 64 + 128 scales of 4 bytes; staging:
    # two warpgroups × 64 tokens × 144 bytes; 16 bytes of barriers a stage
    stage, scales = 128 * 64 + 64 * 128, (64 + 128) * 4
    expected = 4 * stage + 4 * scales + 2 * 64 * 144 + 4 * 16
    assert linear_shared_bytes(kind, Tile(64), hopper=True) == expected
    assert linear_shared_bytes(kind, Tile(64), hopper=False) == 4 * (stage + scales)
    assert linear_shared_bytes(kind, Tile(64, starts=True), hopper=True) == expected + 256
    # two warpgroups share 64 channels: half the weights, one staging, one's sums of 4 bytes
    stage, scales = 64 * 64 + 64 * 128, (64 + 64) * 4
    shared = 4 * stage + 4 * scales + 64 * 144 + 64 * 64 * 4 + 4 * 16
    assert linear_shared_bytes(kind, Tile(64, splits=2), hopper=True) == shared


@pytest.mark.parametrize(
    ("name", "tile", "limits", "match"),
    [
        ("w8 g128", Tile(64, turns=1), Limits(hopper=False), "are for Hopper"),
        ("w8 channel token", Tile(64, turns=1), Limits(), "that promote along k"),
        ("w8 g96", Tile(64, pipelined=True), Limits(), "not every 32"),
        ("w8 g128", Tile(64, turns=2, pipelined=True), Limits(), "wait for its turn's end"),
        ("w8 channel token", Tile(64, starts=True), Limits(), "start from a constant on Hopper"),
        ("w8 g128", Tile(64, starts=True), Limits(hopper=False), "start from a constant on Hopper"),
        ("w8 g128", Tile(64, splits=2), Limits(hopper=False), "panels are shared on Hopper"),
        ("w8 g96", Tile(64, splits=2), Limits(), "panels are shared on Hopper"),
        ("w8 g128", Tile(64, turns=1, splits=2), Limits(), "without turns or pipelining"),
        ("w8 g128", Tile(64, 3, 5, splits=3), Limits(), "two stages for each part"),
        ("w8 channel token", Tile(224, 3, 3), Limits(), "than a block starts with"),
        ("w8 g128", Tile(224), Limits(), "registers a thread"),
        ("w8 g128", Tile(128, 2, 8), Limits(), "bytes of shared memory"),
        ("w8 g128", Tile(128, 2, 4), Limits(shared_bytes=99 << 10), "101376 are there"),
    ],
)
def test_a_tile_that_does_not_fit_says_why(
    name: str, tile: Tile, limits: Limits, match: str
) -> None:
    problem = tile_problem(LinearKind.of(SCHEMES[name], 1152), tile, limits)
    assert problem is not None
    assert match in problem


def test_panels_are_not_shared_by_more_parts_than_there_are() -> None:
    kind = LinearKind.of(SCHEMES["w8 g128"], 256)
    assert tile_problem(kind, Tile(64, 2, 6, splits=2), Limits()) is None
    problem = tile_problem(kind, Tile(64, 3, 6, splits=3), Limits())
    assert problem == "2 panels of 128 k are too few for 3 parts"


def test_splits_divide_the_warpgroups() -> None:
    with pytest.raises(InputError, match="must divide its 3 warpgroups, got 2"):
        Tile(64, 3, splits=2)


@pytest.mark.parametrize("tokens", [0, 8, 24, 272])
def test_a_tile_has_a_multiple_of_16_tokens(tokens: int) -> None:
    with pytest.raises(InputError, match="a multiple of 16 up to 256"):
        Tile(tokens)


def test_weight_only_kinds() -> None:
    kind = WeightOnlyKind.of(LayerScheme(3, 16, 96, weight_symmetric=False), 1152)
    assert (kind.weight_bits, kind.segment, kind.weight_zero) == (4, 32, True)
    with pytest.raises(InputError, match="multiples of 32"):
        WeightOnlyKind.of(LayerScheme(4, 16, 144), 1152)
