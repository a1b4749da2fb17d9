"""A comparison as data: how far two tensors are apart, and where they are furthest apart."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Worst:
    """The coordinate of the largest absolute difference, both values there, and the tolerance.

    `where` is the position of the compared tensor in its sequence, then the index in it.
    `needed_tolerance` is the absolute tolerance with which every element would have agreed.
    """

    where: tuple[int, ...]
    expected: float
    got: float
    needed_tolerance: float


@dataclass(frozen=True)
class Comparison:
    """`got` against `expected` over all compared tensors.

    distance = ‖got − expected‖ and norm = ‖expected‖ (Frobenius); relative_error is their quotient:
    0 for equal tensors, infinite where anything is not finite or the norm alone is 0.
    """

    distance: float
    norm: float
    elements: int
    worst: Worst | None

    @property
    def relative_error(self) -> float:
        if self.distance == 0:
            return 0.0
        return self.distance / self.norm if self.norm > 0 else math.inf


@dataclass
class Comparer:
    """Adds up a comparison tensor by tensor, in float64, so that nothing has to be kept."""

    _squared_distance: float = 0.0
    _squared_norm: float = 0.0
    _elements: int = 0
    _count: int = 0
    _worst: Worst | None = field(default=None)

    def add(self, got: Tensor, expected: Tensor) -> None:
        """Compare two tensors of one shape, any dtypes and devices."""
        if got.shape != expected.shape:
            raise ValueError(f"cannot compare shapes {list(got.shape)} and {list(expected.shape)}")
        wide = expected.detach().cpu().double()
        difference = got.detach().cpu().double() - wide
        self._squared_norm += _squared_sum(wide)
        # NaN − x and ∞ − ∞ are NaN: counted as infinitely far, so that no check can pass on them
        difference = torch.where(difference.isnan(), math.inf, difference.abs())
        self._squared_distance += _squared_sum(difference)
        if difference.numel():
            self._find_worst(got, wide, difference)
        self._elements += difference.numel()
        self._count += 1

    def result(self) -> Comparison:
        distance, norm = math.sqrt(self._squared_distance), math.sqrt(self._squared_norm)
        return Comparison(distance, norm, self._elements, self._worst)

    def _find_worst(self, got: Tensor, expected: Tensor, difference: Tensor) -> None:
        flat = int(difference.argmax())
        largest = float(difference.flatten()[flat])
        if self._worst is None or largest > self._worst.needed_tolerance:
            index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), got.shape))
            self._worst = Worst(
                (self._count, *index), float(expected[index]), float(got[index]), largest
            )


def compare(got: Tensor, expected: Tensor) -> Comparison:
    """Compare one tensor with another."""
    comparer = Comparer()
    comparer.add(got, expected)
    return comparer.result()


def _squared_sum(values: Tensor) -> float:
    # not vdot of a flattened copy: one pass, no second buffer
    return float(values.square().sum())
