"""FID against scipy's matrix root, closed forms, and Gaussians of known difference."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg

from qdit.calibrate.fid import (
    Statistics,
    fid_difference,
    frechet_distance,
    read_reference,
    statistics,
)
from qdit.calibrate.fid_resampling import WeightedFid
from qdit.calibrate.frechet import Array
from qdit.errors import ArtifactError, InputError


def random_statistics(seed: int, dimensions: int, rank: int | None = None) -> Statistics:
    generator = np.random.default_rng(seed)
    basis = generator.standard_normal((dimensions, rank or 2 * dimensions))
    return Statistics(generator.standard_normal(dimensions), basis @ basis.T / dimensions)


def scipy_distance(first: Statistics, second: Statistics) -> float:
    """The formula as published, with scipy's Schur-based root of the plain product."""
    root = scipy.linalg.sqrtm(first.sigma @ second.sigma)
    shift = first.mu - second.mu
    return float(
        shift @ shift + np.trace(first.sigma) + np.trace(second.sigma) - 2 * np.trace(root).real
    )


# --- the distance -------------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [1, 2, 7, 64])
def test_distance_equals_the_published_formula_with_scipys_root(dimensions: int) -> None:
    first, second = random_statistics(1, dimensions), random_statistics(2, dimensions)
    assert frechet_distance(first, second) == pytest.approx(scipy_distance(first, second), rel=1e-9)


def test_distance_of_diagonal_gaussians_is_the_closed_form() -> None:
    # For diagonal covariances: Σ (μ1−μ2)² + Σ (√v1 − √v2)²
    first = Statistics(np.array([0.0, 1.0, 2.0]), np.diag([1.0, 4.0, 9.0]))
    second = Statistics(np.array([1.0, 1.0, 0.0]), np.diag([4.0, 4.0, 0.0]))
    assert frechet_distance(first, second) == pytest.approx((1 + 0 + 4) + (1 + 0 + 9), rel=1e-12)


@pytest.mark.parametrize("rank", [1, 5], ids="rank{}".format)
def test_singular_covariances_keep_the_closed_form(rank: int) -> None:
    # Orthogonal supports share nothing, equal ones everything: tr(Σ1)+tr(Σ2) and 0.
    values = np.zeros(12)
    values[:rank] = 2.0
    first = Statistics(np.zeros(12), np.diag(values))
    second = Statistics(np.zeros(12), np.diag(values[::-1].copy()))
    assert frechet_distance(first, second) == pytest.approx(4.0 * rank)
    assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-9)


def test_distance_is_symmetric_shift_invariant_and_scales_quadratically() -> None:
    first, second = random_statistics(3, 10, rank=4), random_statistics(4, 10)
    plain = frechet_distance(first, second)
    assert frechet_distance(second, first) == pytest.approx(plain, rel=1e-7)
    shifted = [Statistics(s.mu + 5, s.sigma) for s in (first, second)]
    assert frechet_distance(*shifted) == pytest.approx(plain, rel=1e-9)
    scaled = [Statistics(s.mu * 3, s.sigma * 9) for s in (first, second)]
    assert frechet_distance(*scaled) == pytest.approx(9 * plain, rel=1e-9)


def test_distance_refuses_different_dimensions() -> None:
    with pytest.raises(InputError, match="same number of features, got 3 and 4"):
        frechet_distance(random_statistics(0, 3), random_statistics(0, 4))


def test_statistics_are_numpys_mean_and_unbiased_covariance() -> None:
    features = np.random.default_rng(0).standard_normal((20, 5)).astype(np.float32)
    made = statistics(features)
    np.testing.assert_allclose(made.mu, features.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(made.sigma, np.cov(features.astype(np.float64).T), rtol=1e-10)
    assert made.sigma.dtype == np.float64


@pytest.mark.parametrize(
    ("mu", "sigma", "message"),
    [
        (np.zeros((2, 1)), np.eye(2), r"mu must have shape \[D\], got \[2, 1\]"),
        (np.zeros(2), np.eye(3), r"sigma must have shape \[2, 2\].*got \[3, 3\]"),
        (np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]]), "sigma must be symmetric"),
        (np.array([0.0, np.nan]), np.eye(2), "mu must be finite"),
        (np.zeros(2), np.diag([1.0, np.inf]), "sigma must be finite"),
        (np.zeros(2), np.diag([1.0, -1.0]), "must not be negative, got -1"),
    ],
    ids=["mu-shape", "sigma-shape", "asymmetric", "nan", "inf", "negative-variance"],
)
def test_malformed_statistics_cannot_be_built(mu: Array, sigma: Array, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Statistics(mu, sigma)


# --- the reference file -------------------------------------------------------------------------


def test_reference_in_the_adm_layout_is_read_and_other_keys_are_left(tmp_path: Path) -> None:
    made = random_statistics(5, 6)
    path = tmp_path / "VIRTUAL_imagenet.npz"
    # arr_0 is the batch of images in ADM's files; an object array there proves it is never read
    extra = {"arr_0": np.array([{"pickled": 1}], dtype=object), "mu_s": np.zeros(3)}
    np.savez(path, mu=made.mu, sigma=made.sigma, **extra)
    read = read_reference(path)
    np.testing.assert_array_equal(read.mu, made.mu)
    np.testing.assert_array_equal(read.sigma, made.sigma)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(2)}, "must hold mu and sigma, got only mu"),
        ({"mu": np.zeros(2), "sigma": np.eye(3)}, r"sigma must have shape \[2, 2\]"),
        ({"mu": np.array([{}, {}]), "sigma": np.eye(2)}, "not a readable .npz of plain arrays"),
        ({"mu": np.zeros(2, dtype=complex), "sigma": np.eye(2)}, "mu in .* real numbers"),
        ({"mu": np.zeros(2), "sigma": np.diag([1.0, np.nan])}, "sigma must be finite"),
    ],
    ids=["missing", "shapes", "pickle", "complex", "nan"],
)
def test_malformed_references_are_refused(
    tmp_path: Path, arrays: dict[str, Array], message: str
) -> None:
    path = tmp_path / "reference.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match=message):
        read_reference(path)


def test_a_truncated_a_foreign_and_a_missing_reference_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    np.savez(path, mu=np.zeros(50), sigma=np.eye(50))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ArtifactError, match="not a readable"):
        read_reference(path)
    np.save(tmp_path / "single.npy", np.zeros(3))
    with pytest.raises(ArtifactError, match="single array"):
        read_reference(tmp_path / "single.npy")
    with pytest.raises(InputError, match="no reference statistics at"):
        read_reference(tmp_path / "nowhere.npz")


# --- resampling ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "dimensions"), [(30, 8), (12, 20)], ids=["n>D", "n<D"])
def test_weighted_fid_is_the_fid_of_repeated_rows(n: int, dimensions: int) -> None:
    generator = np.random.default_rng(6)
    features = generator.standard_normal((n, dimensions)) * 2 + 1
    reference = random_statistics(7, dimensions)
    counts = np.bincount(generator.integers(n, size=n), minlength=n).astype(np.float64)
    repeated = statistics(np.repeat(features, counts.astype(int), axis=0))
    weighted = WeightedFid.of(features, reference)
    assert weighted.value(counts) == pytest.approx(frechet_distance(repeated, reference), rel=1e-6)
    plain = frechet_distance(statistics(features), reference)
    assert weighted.plain() == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize(("n", "dimensions"), [(40, 5), (12, 30)], ids=["n>D", "n<D"])
def test_influence_is_the_slope_of_fid_in_each_images_weight(n: int, dimensions: int) -> None:
    generator = np.random.default_rng(8)
    weighted = WeightedFid.of(
        generator.standard_normal((n, dimensions)) + 0.5, random_statistics(9, dimensions)
    )
    step = 1e-4
    for image in (0, n // 2):
        direction = np.full(n, -1.0 / n)
        direction[image] += 1.0
        up, down = (weighted.value(np.ones(n) + sign * step * direction) for sign in (1, -1))
        slope = (up - down) / (2 * step) * n
        assert weighted.influence()[image] == pytest.approx(slope, rel=1e-3, abs=1e-4)


class Pairs:
    """Gaussian features whose FIDs are known: quantized = gain · full + shift + noise."""

    def __init__(self, dimensions: int) -> None:
        generator = np.random.default_rng(10)
        self.dimensions = dimensions
        self.reference = Statistics(
            np.zeros(dimensions), np.diag(np.geomspace(1, 0.05, dimensions))
        )
        self.deviation = np.sqrt(np.diag(self.reference.sigma)) * 1.05
        self.mean = 0.1 * generator.standard_normal(dimensions)
        self.gain, self.noise, self.shift = 1.02, 0.1, 0.05

    @property
    def true_difference(self) -> float:
        full = Statistics(self.mean, np.diag(self.deviation**2))
        variance = (self.gain * self.deviation) ** 2 + self.noise**2
        quantized = Statistics(self.gain * self.mean + self.shift, np.diag(variance))
        return frechet_distance(quantized, self.reference) - frechet_distance(full, self.reference)

    def draw(self, generator: np.random.Generator, n: int) -> tuple[Array, Array]:
        full = self.mean + self.deviation * generator.standard_normal((n, self.dimensions))
        noise = self.noise * generator.standard_normal(full.shape)
        return full, self.gain * full + self.shift + noise


@pytest.mark.parametrize(("n", "dimensions"), [(60, 6), (200, 12)])
def test_the_interval_holds_the_known_difference_in_95_percent_of_repeats(
    n: int, dimensions: int
) -> None:
    pairs, generator = Pairs(dimensions), np.random.default_rng(11)
    true, repeats = pairs.true_difference, 150
    held = 0
    for repeat in range(repeats):
        made = fid_difference(
            *pairs.draw(generator, n), pairs.reference, resamples=100, seed=repeat
        )
        held += made.ci95[0] <= true <= made.ci95[1]
    # 150 repeats at 95 % hold 142.5 ± 2.7; 88 % is where a sound interval falls once in 5,000
    assert held / repeats >= 0.88


def test_with_fewer_images_than_features_it_holds_the_difference_at_this_number() -> None:
    pairs, generator, n = Pairs(48), np.random.default_rng(12), 24
    sides = [pairs.draw(generator, n) for _ in range(600)]
    plain = [[WeightedFid.of(s, pairs.reference).plain() for s in pair] for pair in sides]
    expected = float(np.mean([quantized - full for full, quantized in plain]))
    held = 0
    for repeat, pair in enumerate(sides[:120]):
        made = fid_difference(*pair, pairs.reference, resamples=100, seed=repeat)
        held += made.ci95[0] <= expected <= made.ci95[1]
    assert held / 120 >= 0.88
    assert "valid for this number of images only" in made.method


def test_first_order_resamples_agree_with_full_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = Pairs(16)
    drawn = pairs.draw(np.random.default_rng(13), 400)
    full = fid_difference(*drawn, pairs.reference, resamples=600)
    assert full.full_resamples == 600
    monkeypatch.setattr("qdit.calibrate.fid._OPERATIONS", 0.0)
    quick = fid_difference(*drawn, pairs.reference, resamples=600)
    assert quick.full_resamples == 10
    width = full.ci95[1] - full.ci95[0]
    assert quick.ci95 == pytest.approx(full.ci95, abs=0.15 * width)


def test_difference_is_that_of_the_two_distances_and_lies_in_the_interval() -> None:
    pairs = Pairs(8)
    full, quantized = pairs.draw(np.random.default_rng(14), 50)
    made = fid_difference(full, quantized, pairs.reference, resamples=200, seed=3)
    distances = [frechet_distance(statistics(f), pairs.reference) for f in (full, quantized)]
    assert made.full_precision == pytest.approx(distances[0], rel=1e-9)
    assert made.quantized == pytest.approx(distances[1], rel=1e-9)
    assert made.difference == pytest.approx(distances[1] - distances[0], rel=1e-7)
    assert made.ci95[0] <= made.difference <= made.ci95[1]
    assert (made.samples, made.dimensions, made.resamples) == (50, 8, 200)
    assert made == fid_difference(full, quantized, pairs.reference, resamples=200, seed=3)


def test_identical_features_differ_by_exactly_nothing() -> None:
    features = np.random.default_rng(15).standard_normal((30, 4))
    made = fid_difference(features, features.copy(), random_statistics(16, 4), resamples=100)
    assert (made.difference, made.ci95) == (0.0, (0.0, 0.0))


def test_pairing_narrows_the_interval() -> None:
    pairs = Pairs(6)
    full, quantized = pairs.draw(np.random.default_rng(17), 200)
    paired = fid_difference(full, quantized, pairs.reference, resamples=200)
    shuffled = fid_difference(full, quantized[::-1].copy(), pairs.reference, resamples=200)
    widths = [made.ci95[1] - made.ci95[0] for made in (paired, shuffled)]
    assert widths[0] < 0.7 * widths[1]
    assert paired.difference == pytest.approx(shuffled.difference)


@pytest.mark.parametrize(
    ("full", "quantized", "message"),
    [
        (np.zeros((4, 3)), np.zeros((5, 3)), "paired features must have equal shapes"),
        (np.zeros((4, 2)), np.zeros((4, 2)), "must be of the same 2 features.*got 3"),
        (np.zeros((1, 3)), np.zeros((1, 3)), "at least 2 images"),
        (np.zeros((4, 3)), np.full((4, 3), np.nan), "the quantized images.*for image 0"),
    ],
    ids=["unpaired", "other-network", "one-image", "nan"],
)
def test_features_that_cannot_be_compared_are_refused(
    full: Array, quantized: Array, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        fid_difference(full, quantized, random_statistics(18, 3))


def test_too_few_resamples_are_refused() -> None:
    features = np.random.default_rng(19).standard_normal((5, 3))
    with pytest.raises(InputError, match="at least 100 resamples, got 10"):
        fid_difference(features, features, random_statistics(18, 3), resamples=10)


@pytest.mark.parametrize("dimensions", [256, 2048])
def test_few_images_are_fast(dimensions: int) -> None:
    generator = np.random.default_rng(20)
    full = generator.standard_normal((64, dimensions))
    reference = Statistics(np.zeros(dimensions), np.eye(dimensions))
    start = time.process_time()
    fid_difference(full, full + 0.1 * generator.standard_normal(full.shape), reference)
    assert time.process_time() - start < 5  # 0.3 s and 0.6 s of CPU time when alone
