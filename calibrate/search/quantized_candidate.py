"""Plans as they would ship: quantized as an export quantizes, to be judged by their images."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ..blockwise import Method, quantize_model
from ..model import DiffusionModel
from ..plan import QuantizationPlan
from ..trajectories import CalibrationSet


class QuantizedCandidate:
    """A `fitness.Switchable` that quantizes a copy of the model for every plan it takes on.

    Slower than a `CandidateDenoiser` and exact: GPTQ on the inputs that the quantized layers before
    give, so the images are those of the exported plan. One copy is held beside the model.
    """

    def __init__(
        self,
        model: DiffusionModel,
        method: Method,
        calibration: CalibrationSet | None,
        *,
        batch_size: int = 32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._model = model
        self._method: Method = method
        self._calibration = calibration
        self._batch_size = batch_size
        self._device = device
        self._quantized: nn.Module | None = None

    @property
    def module(self) -> nn.Module:
        return self._model.denoiser if self._quantized is None else self._quantized

    def apply(self, plan: QuantizationPlan) -> None:
        """Become the simulation of `plan`."""
        self.reset()
        fresh = copy.copy(self._model)
        fresh.denoiser = copy.deepcopy(self._model.denoiser)
        quantize_model(
            fresh,
            plan,
            self._method,
            self._calibration,
            batch_size=self._batch_size,
            device=self._device,
        )
        self._quantized = fresh.denoiser

    def reset(self) -> None:
        """Become full precision again."""
        self._quantized = None
