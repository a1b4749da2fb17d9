"""The time estimate, and the number of images that follows from a device's speed."""

from __future__ import annotations

import pytest

from qdit.calibrate.sources import load_model
from qdit.engines.estimate import choose_fid_samples, estimate, forwards_per_image
from qdit.engines.options import ExportOptions
from qdit.engines.search.forecast import forecast


def test_guidance_doubles_the_cost_of_an_image() -> None:
    assert forwards_per_image(ExportOptions(num_inference_steps=10, guidance_scale=1.0)) == 10
    assert forwards_per_image(ExportOptions(num_inference_steps=10, guidance_scale=1.5)) == 20


@pytest.mark.parametrize(
    ("seconds", "device", "count"),
    [
        (0.025, "cpu", 32),  # 60 s / (0.025 s · 40) = 60 images → 32
        (0.02, "cpu", 64),  # 75 images → 64
        (10.0, "cpu", 16),  # never fewer than 16
        (1e-7, "cuda", 10_000),  # never more than 10,000
        (1e-4, "cuda:1", 10_000),
        (1e-3, "cuda", 4096),  # 4500 images → 4096
    ],
    ids=["cpu", "faster", "slow", "fastest", "gpu", "slower gpu"],
)
def test_auto_takes_what_the_device_makes(seconds: float, device: str, count: int) -> None:
    options = ExportOptions(num_inference_steps=20, guidance_scale=1.5)
    assert choose_fid_samples(options, seconds, device) == count


def test_a_given_number_is_taken_as_it_is() -> None:
    assert choose_fid_samples(ExportOptions(fid_samples=7), 1.0, "cpu") == 7


def test_the_estimate_grows_with_what_is_asked_for() -> None:
    model = load_model("random:DiT-S/2", blocks=1)
    small = estimate(ExportOptions(calib_samples=64, fid_samples=16), model, 0.01)
    large = estimate(ExportOptions(calib_samples=256, fid_samples=64), model, 0.01)
    nearest = estimate(ExportOptions(weights="nearest", fid_samples=16), model, 0.01)
    assert small.total < large.total
    assert large.seconds["quantize"] == pytest.approx(4 * small.seconds["quantize"])
    assert "calibration" not in nearest.seconds


def test_a_search_is_counted_before_it_starts() -> None:
    nothing = forecast(ExportOptions(), 56, "cpu")
    assert (nothing.trajectories, nothing.plans, nothing.forwards) == (0, 0, 0)
    # 58 trajectories of 4 images and 4 plans by 16 images, 10 steps with guidance
    options = ExportOptions(search="sensitivity")
    found = forecast(options, 56, "cpu")
    assert (found.trajectories, found.plans) == (58, 4)
    assert found.forwards == (58 * 4 + 4 * 16) * 10 * 2
    alone = forecast(ExportOptions(search="sensitivity", search_refine=1), 56, "cpu")
    assert alone.plans == 0
    # the paper's: 550 candidates of 800 images at 50 steps
    paper = forecast(ExportOptions(search="evolutionary"), 112, "cuda:0")
    assert paper.plans == 550
    assert paper.forwards == 550 * 800 * 50


def test_a_search_adds_its_time() -> None:
    model = load_model("random:DiT-S/2", blocks=1)
    without = estimate(ExportOptions(fid_samples=16), model, 0.01)
    found = estimate(ExportOptions(fid_samples=16, search="sensitivity"), model, 0.01)
    assert found.total == pytest.approx(without.total + found.seconds["search"])
    nearest = ExportOptions(fid_samples=16, weights="nearest", search="sensitivity")
    # a search samples calibration inputs whatever the rounding
    assert "calibration" in estimate(nearest, model, 0.01).seconds
