"""Fréchet distance between two Gaussians fitted to features (Heusel et al. 2017, equation 6)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from demo_recipe.errors import RecipeError
from demo_recipe.files import write_atomically


@dataclass(frozen=True)
class Statistics:
    """``mu`` float64 [D] and ``sigma`` float64 [D, D], the unbiased covariance."""

    mu: np.ndarray
    sigma: np.ndarray


def statistics_of(features: np.ndarray) -> Statistics:
    """Mean and covariance of ``features`` [N, D], computed in float64."""
    wide = features.astype(np.float64)
    return Statistics(wide.mean(axis=0), np.cov(wide, rowvar=False))


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """``|mu1 - mu2|² + tr(S1 + S2 - 2 (S1 S2)^½)``.

    The trace of the root is the sum of the roots of the eigenvalues of ``S1^½ S2 S1^½``, which is
    symmetric: no complex arithmetic, and rounding below zero is cut off.
    """
    values, vectors = np.linalg.eigh(first.sigma)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ second.sigma @ root)
    difference = first.mu - second.mu
    traces = np.trace(first.sigma) + np.trace(second.sigma)
    return float(difference @ difference + traces - 2 * np.sqrt(product.clip(min=0)).sum())


def save_statistics(path: Path, statistics: Statistics) -> None:
    """Write ``mu`` and ``sigma`` as an .npz file, atomically."""
    write_atomically(path, lambda temporary: _save_npz(temporary, statistics))


def load_statistics(path: Path) -> Statistics:
    """Read what ``save_statistics`` wrote.

    Raises:
        RecipeError: the file is missing or holds no ``mu`` and ``sigma``.
    """
    try:
        with np.load(path) as arrays:
            return Statistics(arrays["mu"], arrays["sigma"])
    except (OSError, KeyError, ValueError) as error:
        raise RecipeError(
            f"the reference must be an .npz file with mu and sigma, got {str(path)!r}; "
            "train_demo.py writes one as reference.npz"
        ) from error


def _save_npz(path: Path, statistics: Statistics) -> None:
    with path.open("wb") as file:
        np.savez(file, mu=statistics.mu, sigma=statistics.sigma)
