"""Sample pictures pixel by pixel, and figures as text."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qdit.engines.report import numbers
from qdit.engines.report.grid import encode, make_samples, write_grid

# --- pictures -----------------------------------------------------------------------------------


def test_the_difference_is_tenfold_about_grey_and_clipped() -> None:
    full = torch.zeros(1, 3, 1, 2)
    quantized = torch.zeros(1, 3, 1, 2)
    quantized[0, 0] = 0.02  # red: 10 · 0.02 = 0.2 → 0.2 · 127.5 + 127.5 = 153, to nearest
    quantized[0, 1] = -0.5  # green: far below −1 once multiplied
    samples = make_samples(full, quantized)
    assert samples.full[0, 0, 0].tolist() == [128, 128, 128]
    assert samples.difference[0, 0, 0].tolist() == [153, 0, 128]


def test_small_images_are_enlarged_by_whole_pixels(tmp_path: Path) -> None:
    full = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    samples = make_samples(full, full, ("cat", "dog"))
    write_grid(samples, tmp_path / "samples.png", "w4a8")
    sheet = np.asarray(Image.open(tmp_path / "samples.png"))
    side = 128  # 32 · round(112 / 32)
    assert sheet.shape == (22 + 3 * (side + 4), 132 + 2 * (side + 4), 3)
    first = sheet[22 : 22 + side, 132 : 132 + side]
    np.testing.assert_array_equal(first[::4, ::4], samples.full[0])
    np.testing.assert_array_equal(first[1::4, 3::4], samples.full[0])
    quantized = sheet[22 + side + 4 :][:side, 132 + side + 4 :][:, :side]
    np.testing.assert_array_equal(quantized[::4, ::4], samples.quantized[1])
    labels = sheet[:, :132]
    assert (labels < 128).any(), "the rows are labelled"


def test_equal_pictures_are_equal_bytes(tmp_path: Path) -> None:
    samples = make_samples(torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8))
    for name in ("a.png", "b.png"):
        write_grid(samples, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_large_images_are_reduced_and_small_ones_kept_exactly() -> None:
    small = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    media, data = encode(small)
    assert media == "image/png"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), small)
    media, data = encode(np.zeros((512, 256, 3), dtype=np.uint8))
    assert media == "image/jpeg"
    assert Image.open(io.BytesIO(data)).size == (96, 192)


def test_a_grid_of_large_images_stays_below_its_limit(tmp_path: Path) -> None:
    samples = make_samples(torch.zeros(1, 3, 512, 512), torch.zeros(1, 3, 512, 512))
    write_grid(samples, tmp_path / "samples.png")
    assert Image.open(tmp_path / "samples.png").size == (132 + 260, 4 + 3 * 260)


def test_images_that_are_not_finite_are_drawn_not_refused() -> None:
    broken = torch.full((1, 3, 2, 2), float("nan"))
    assert make_samples(broken, broken).full.max() == 255


# --- figures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (numbers.byte_size(0), "0 B"),
        (numbers.byte_size(999), "999 B"),
        (numbers.byte_size(10_712_345), "10.7 MB"),
        (numbers.byte_size(999_600), "1.00 MB"),
        (numbers.byte_size(2_600_000_000), "2.60 GB"),
        (numbers.error(0.0521), "5.21 %"),
        (numbers.error(0.09996), "10.0 %"),
        (numbers.error(0.9999), "100 %"),
        (numbers.error(2.39e-7), "2.4 × 10⁻⁷"),
        (numbers.error(0.0), "0"),
        (numbers.error(None), "not finite"),
        (numbers.plain(5.3049), "5.30"),
        (numbers.plain(-0.0907), "−0.0907"),
        (numbers.plain(1234.5), "1234"),
        (numbers.plain(None), "–"),
        (numbers.signed(0.0907), "+0.0907"),
        (numbers.signed(-2.0), "−2.00"),
        (numbers.decibel(43.71), "43.7 dB"),
        (numbers.decibel(None), "–"),
        (numbers.seconds(0.417), "0.42 s"),
        (numbers.seconds(12.34), "12.3 s"),
        (numbers.seconds(132.4), "2 min 12 s"),
        (numbers.seconds(7512), "2 h 5 min"),
        (numbers.count(10000), "10,000"),
        (numbers.millions(675_129_632), "675 M"),
        (numbers.millions(85_100), "85.1 k"),
    ],
)
def test_figures_as_text(made: str, expected: str) -> None:
    assert made.replace("\u00a0", " ") == expected


@pytest.mark.parametrize("value", [9.994, 9.996, 99.94, 99.96, 999.4, 0.9996, 1e-9, 123456.0])
def test_rounding_never_shows_a_stray_point_or_a_fourth_digit(value: float) -> None:
    shown = numbers.plain(value).split("\u00a0")[0]
    assert not shown.endswith(".")
    assert abs(float(shown) - value) <= 0.006 * value or "×" in numbers.plain(value)
