"""A loaded diffusion model: denoiser, scheduler, family, and where it came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .families.base import Denoiser, Family
from .plan import LinearSpec


@dataclass(frozen=True)
class ModelSource:
    """Provenance: `kind` is 'demo', 'diffusers', 'original-dit' or 'random'.

    `location` is a path, a Hub id or 'random:DiT-XL/2'; `sha256` is over the weight files' bytes
    ('' for random weights, which `seed` decides).
    """

    kind: str
    location: str
    sha256: str
    seed: int | None = None


@dataclass
class DiffusionModel:
    """The full-precision model. `features` and `reference` are FID files that came with it."""

    name: str
    source: ModelSource
    family: Family
    denoiser: nn.Module
    config: dict[str, Any]
    scheduler_config: dict[str, Any]
    vae: nn.Module | None = None
    features: Path | None = None
    reference: Path | None = None
    class_names: tuple[str, ...] = field(default=())

    @property
    def linears(self) -> list[LinearSpec]:
        return self.family.linears(self.denoiser)

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape [C, H, W] of one noise sample."""
        return self.family.inputs(self.denoiser)[0].shape

    def parameter_count(self) -> int:
        """Parameters, tied ones counted once."""
        return sum(p.numel() for p in self.denoiser.parameters())

    def as_denoiser(self, denoiser: nn.Module | None = None) -> Denoiser:
        """Wrap a torch denoiser of this family for the sampling loop."""
        module = self.denoiser if denoiser is None else denoiser

        @torch.inference_mode()
        def call(x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
            output = self.family.forward(module, x, timestep, label)
            return self.family.noise_prediction(module, output)

        return call
