"""FID as a function of how often each image counts: what the bootstrap evaluates again and again.

The images' features X [n, D] and the reference (μ, Σ) are fixed; counts c [n] with Σc = n vary.
Then FID(c) = |m − μ|² + tr S + tr Σ − 2 tr (SΣ)^½ with the weighted mean m and covariance S.
The root needs eigenvalues of a matrix of the smaller of n and D rows:

* n ≤ D: those of the centred Gram matrix X Σ Xᵀ [n, n], made once for all counts;
* n > D: those of Fᵀ S F [r, r] with Σ = F Fᵀ, from rows X F made once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from .frechet import Array, Statistics, factor, root_eigenvalues


class WeightedFid(ABC):
    """FID of one set of images against a reference, for any counts."""

    def __init__(self, features: Array, reference: Statistics) -> None:
        self.rows = features - reference.mu
        self.count = len(features)
        self._squares = np.einsum("ij,ij->i", self.rows, self.rows)
        self._reference_trace = float(np.trace(reference.sigma))

    @staticmethod
    def of(features: Array, reference: Statistics, root: Array | None = None) -> WeightedFid:
        """The cheaper of the two forms. `root` is `factor(reference.sigma)` where it is known."""
        if features.shape[0] <= features.shape[1]:
            return _GramFid(features, reference)
        return _CovarianceFid(
            features, reference, factor(reference.sigma) if root is None else root
        )

    def value(self, counts: Array) -> float:
        """FID where image i counts `counts[i]` times; the counts sum to n."""
        mean = counts @ self.rows / self.count
        trace = (counts @ self._squares - self.count * mean @ mean) / (self.count - 1)
        return float(mean @ mean + trace + self._reference_trace - 2 * self._root_trace(counts))

    def plain(self) -> float:
        """FID of the images as they are."""
        return self.value(np.ones(self.count))

    def influence(self) -> Array:
        """dFID/dc_i at c = 1, less its mean, times n: float64 [n] (Hampel's influence function).

        With m the mean, x_i a centred row and A = FᵀSF:
        2 (m − μ)·x_i + n/(n−1) (|x_i|² − (Fᵀx_i)ᵀ A^(−½) (Fᵀx_i)), on the support of A.
        """
        mean = self.rows.mean(axis=0)
        centred = self.rows - mean
        squares = np.einsum("ij,ij->i", centred, centred)
        unbiased = self.count / (self.count - 1)
        values: Array = 2 * centred @ mean + unbiased * (squares - self._root_slopes())
        return values - values.mean()

    @property
    @abstractmethod
    def cost(self) -> float:
        """Floating-point operations of one `value`, roughly."""

    @abstractmethod
    def _root_trace(self, counts: Array) -> float:
        """tr (SΣ)^½ for these counts."""

    @abstractmethod
    def _root_slopes(self) -> Array:
        """(Fᵀx_i)ᵀ A^(−½) (Fᵀx_i) for each image: [n]."""


class _GramFid(WeightedFid):
    def __init__(self, features: Array, reference: Statistics) -> None:
        super().__init__(features, reference)
        centred = self.rows - self.rows.mean(axis=0)
        self._gram = centred @ reference.sigma @ centred.T

    @property
    def cost(self) -> float:
        return 10.0 * self.count**3

    def _root_trace(self, counts: Array) -> float:
        chosen = np.flatnonzero(counts)
        weights = counts[chosen]
        gram = self._gram[np.ix_(chosen, chosen)]
        towards_mean = gram @ weights / self.count
        centred = gram - towards_mean - towards_mean[:, None] + weights @ towards_mean / self.count
        scale = np.sqrt(weights / (self.count - 1))
        return float(root_eigenvalues(centred * scale * scale[:, None]).sum())

    def _root_slopes(self) -> Array:
        # X F = √(n−1) U Λ^½ Vᵀ, so the slope is (n−1) Σ_k U_ik² √λ_k
        values, vectors = np.linalg.eigh(self._gram / (self.count - 1))
        return (self.count - 1) * (vectors**2 @ np.sqrt(values.clip(min=0)))


class _CovarianceFid(WeightedFid):
    def __init__(self, features: Array, reference: Statistics, root: Array) -> None:
        super().__init__(features, reference)
        self._projected = (self.rows - self.rows.mean(axis=0)) @ root

    @property
    def cost(self) -> float:
        n, r = self._projected.shape
        return float(n * r**2 + 10 * r**3)

    def _root_trace(self, counts: Array) -> float:
        return float(root_eigenvalues(self._covariance(counts)).sum())

    def _covariance(self, counts: Array) -> Array:
        chosen = np.flatnonzero(counts)
        rows = self._projected[chosen]
        mean = counts[chosen] @ rows / self.count
        rows *= np.sqrt(counts[chosen])[:, None]
        covariance: Array = rows.T @ rows
        covariance -= self.count * np.outer(mean, mean)
        return covariance / (self.count - 1)

    def _root_slopes(self) -> Array:
        values, vectors = np.linalg.eigh(self._covariance(np.ones(self.count)))
        kept = values > values[-1:] * len(values) * np.finfo(np.float64).eps
        coordinates = self._projected @ vectors[:, kept]
        return coordinates**2 @ (1 / np.sqrt(values[kept]))
