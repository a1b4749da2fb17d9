"""Layouts against their definitions: golden bytes, and every element by its own arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qdit.engines.kernels.layouts import (
    from_fragments,
    from_panels,
    padded,
    scale_order,
    to_fragments,
    to_panels,
)


def random_integers(rows: int, width: int, low: int, high: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + width)
    return torch.randint(low, high + 1, (rows, width), generator=generator, dtype=torch.int8)


def test_padded_rounds_up() -> None:
    assert [padded(count, 16) for count in (1, 16, 17)] == [16, 16, 32]


def test_a_panel_s_second_row_has_its_chunks_in_pairs_swapped() -> None:
    # row 1: chunk c of 16 bytes stands at place c XOR 1, so 16 … 31 come before 0 … 15
    values = torch.zeros(2, 128, dtype=torch.int8)
    values[1] = torch.arange(128, dtype=torch.int8)
    panels = to_panels(values)
    assert panels.shape == (1, 16, 128)
    assert panels[0, 1, :32].tolist() == [*range(16, 32), *range(16)]
    assert panels[0, 0].tolist() == [0] * 128


@pytest.mark.parametrize(("rows", "width"), [(1, 32), (16, 128), (13, 300), (40, 1152)])
def test_panels_hold_every_value_at_its_place(rows: int, width: int) -> None:
    values = random_integers(rows, width, -128, 127)
    panels = to_panels(values)
    assert panels.shape == (padded(width, 128) // 128, padded(rows, 16), 128)
    assert torch.equal(from_panels(panels, rows, width), values)
    for row, k in ((0, 0), (rows - 1, width - 1), (rows // 2, width // 3)):
        panel, within = divmod(k, 128)
        place = (within // 16) ^ (row % 8)
        assert panels[panel, row, place * 16 + within % 16] == values[row, k]
    assert panels.to(torch.int64).abs().sum() == values.to(torch.int64).abs().sum()  # zeros else


def test_the_first_thread_s_bytes_worked_out() -> None:
    # thread 0 of warp 0: channels 0 and 8 at k = 0 … 3 (first word) and 16 … 19 (second word)
    # channel 0: -2, -1, 0, 1 → nibbles E, F, 0, 1; channel 8: 7, -8, 3, -4 → 7, 8, 3, C
    # byte i = channel 8's nibble in the high half, channel 0's in the low one
    values = torch.zeros(64, 128, dtype=torch.int8)
    values[0, :4] = torch.tensor([-2, -1, 0, 1], dtype=torch.int8)
    values[8, :4] = torch.tensor([7, -8, 3, -4], dtype=torch.int8)
    values[0, 16] = 5
    fragments = to_fragments(values)
    assert fragments.shape == (1, 1, 4096)
    assert bytes(fragments[0, 0, :8].tolist()) == b"\x7e\x8f\x30\xc1\x05\x00\x00\x00"
    assert int(fragments[0, 0, 8:].sum()) == 0


@pytest.mark.parametrize(("channels", "width"), [(64, 128), (8, 32), (200, 300), (192, 1152)])
def test_fragments_hold_every_value_where_its_thread_takes_it_up(channels: int, width: int) -> None:
    values = random_integers(channels, width, -8, 7)
    fragments = to_fragments(values)
    assert torch.equal(from_fragments(fragments, channels, width), values)
    places = random_integers(2, 64, 0, 127).to(torch.int64).abs()
    for channel, k in zip(
        (places[0] % channels).tolist(), (places[1] % width).tolist(), strict=True
    ):
        warp, inside = divmod(channel % 64, 16)
        half, row = divmod(inside, 8)
        step, within = divmod(k % 128, 32)
        part, rest = divmod(within, 16)
        quad, i = divmod(rest, 4)
        thread = warp * 32 + row * 4 + quad
        at = (step // 2) * 2048 + thread * 16 + (step % 2) * 8 + part * 4 + i
        byte = int(fragments[k // 128, channel // 64, at])
        nibble = byte >> 4 if half else byte & 0xF
        assert (nibble ^ 8) - 8 == int(values[channel, k])


def test_scales_of_sixteen_rows_stand_as_a_thread_reads_them() -> None:
    # thread q reads four neighbours: rows 2q, 2q + 1, 2q + 8, 2q + 9
    order = scale_order(32)
    assert sorted(order.tolist()) == list(range(32))
    for q in range(4):
        rows = [2 * q, 2 * q + 1, 2 * q + 8, 2 * q + 9]
        assert [int(order[row]) for row in rows] == [4 * q + i for i in range(4)]
        assert [int(order[row + 16]) for row in rows] == [16 + 4 * q + i for i in range(4)]
