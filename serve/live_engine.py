"""An engine behind one denoiser that can be probed and opened again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibrate.families.base import Denoiser
from ..calibrate.sampling import SampledModel, initial_noise
from ..errors import StepError


@dataclass(frozen=True)
class Opened:
    """A denoiser and what frees it."""

    denoiser: Denoiser
    close: Callable[[], None]


class LiveEngine:
    """`denoise` is the engine that is open now; `reopen` puts a fresh one in its place.

    One thread at a time may use it. Raises what `open_it` raises, and `StepError` where the
    engine's answer to a probe is not an answer.
    """

    def __init__(self, open_it: Callable[[], Opened], model: SampledModel) -> None:
        self._open_it = open_it
        self._model = model
        self._opened: Opened | None = open_it()
        self.probe()

    def denoise(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """The noise predicted for rows [B, C, H, W]."""
        if self._opened is None:
            raise StepError("the engine is closed")
        return self._opened.denoiser(x, timesteps, labels)

    def probe(self) -> None:
        """One call of two rows: the answer must be finite, of the right shape, and not constant."""
        model = self._model
        x = initial_noise(range(2), model.sample_shape, seed=0)
        timesteps = torch.tensor([500, 999])
        labels = torch.tensor([0, model.null_label])
        answer = self.denoise(x, timesteps, labels)
        if answer.shape != x.shape:
            raise StepError(
                f"the engine must predict {list(x.shape)}, it gave {list(answer.shape)}"
            )
        if not torch.isfinite(answer).all():
            raise StepError("the engine's answer to a probe is not finite")
        if not answer.std() > 0:
            raise StepError("the engine's answer to a probe is one and the same value everywhere")

    def reopen(self) -> None:
        """Close what is open, open it again, and probe it."""
        self.close()
        self._opened = self._open_it()
        self.probe()

    def close(self) -> None:
        """Free the engine; `denoise` raises from then on."""
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()
