"""Block inputs carried from block to block, so that calibration runs every block and not the model.

Where they live: on the CPU if that is the device; on a GPU if they take at most a quarter of its
free memory; else in pinned CPU memory, one batch on the GPU at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .families.base import BlockInputs
from .model import DiffusionModel
from .trajectories import CalibrationSet

GPU_SHARE = 0.25


class CarriedInputs:
    """The inputs [B, T, D] of the next block, batch by batch; starts before the first block."""

    def __init__(
        self,
        model: DiffusionModel,
        calibration: CalibrationSet,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self._device = device
        self._home: torch.device | None = None
        self._hidden: list[Tensor] = []
        self._shared: list[dict[str, Tensor]] = []
        for batch in calibration.batches(batch_size):
            inputs = model.family.before_blocks(
                model.denoiser, *(part.to(device) for part in batch.tensors)
            )
            if self._home is None:
                share = len(batch) / len(calibration)
                self._home = _home_of(int(inputs.hidden_states.nbytes / share), device)
            self._hidden.append(self._to_home(inputs.hidden_states))
            self._shared.append(inputs.shared)

    def __len__(self) -> int:
        return len(self._hidden)

    @property
    def home(self) -> torch.device:
        """Where the hidden states wait between two uses."""
        return self._device if self._home is None else self._home

    def __iter__(self) -> Iterator[BlockInputs]:
        """The batches in order, on the device."""
        for hidden, shared in zip(self._hidden, self._shared, strict=True):
            yield BlockInputs(hidden.to(self._device, non_blocking=True), shared)

    def replace(self, batch: int, hidden_states: Tensor) -> None:
        """Put the next block's input in the place of this block's."""
        if self._hidden[batch].shape == hidden_states.shape:
            # a pinned tensor is reused: pinning anew costs more than the copy
            self._hidden[batch].copy_(hidden_states, non_blocking=True)
        else:
            self._hidden[batch] = self._to_home(hidden_states)

    def _to_home(self, hidden: Tensor) -> Tensor:
        if self.home == hidden.device:
            return hidden.clone()
        waiting = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
        return waiting.copy_(hidden, non_blocking=True)


def _home_of(size: int, device: torch.device) -> torch.device:
    if device.type != "cuda":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    return device if size <= GPU_SHARE * free else torch.device("cpu")
