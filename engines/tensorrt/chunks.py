"""Any number of samples through an engine's batch profile: proofs and sampling choose their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine import Arrays
from .engine import TensorRtEngine

if TYPE_CHECKING:
    from torch import Tensor

    from ...calibrate.families.base import Denoiser, Family


class ChunkedEngine:
    """An engine that takes any batch: cut into pieces of the profile's most samples, the last one
    filled up to its least by repeating a sample. Samples do not depend on each other."""

    def __init__(self, engine: TensorRtEngine) -> None:
        self.engine = engine

    def infer(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """As `TensorRtEngine.infer`, for any batch."""
        batch = len(next(iter(inputs.values())))
        pieces = [
            (len(rows), self.engine.infer({name: a[index] for name, a in inputs.items()}))
            for rows, index in self._pieces(batch)
        ]
        names = [spec.name for spec in self.engine.output_specs]
        return {
            name: np.concatenate([made[name][:count] for count, made in pieces]) for name in names
        }

    def as_denoiser(self, family: Family, config: dict[str, Any]) -> Denoiser:
        """As `TensorRtEngine.as_denoiser`, for any batch."""
        import torch

        whole = self.engine.as_denoiser(family, config)

        def call(x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
            pieces = []
            for rows, index in self._pieces(len(x)):
                place = torch.from_numpy(index).to(x.device)
                made = whole(x[place], timestep[place], label[place])
                pieces.append(made[: len(rows)])
            return torch.cat(pieces)

        return call

    def close(self) -> None:
        self.engine.close()

    def _pieces(self, batch: int) -> Iterator[tuple[range, np.ndarray]]:
        """The samples of each piece, and their indices with the filling."""
        least, _, most = self.engine.batch_profile
        for start in range(0, batch, most):
            rows = range(start, min(start + most, batch))
            filled = [*rows, *[rows[-1]] * (least - len(rows))]
            yield rows, np.asarray(filled)
