"""Stand-ins that a denoiser is given before it is traced, so that no weight enters the trace."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate.plan import LinearSpec
from ..calibrate.simulate import replace_linear
from .opsets import BLOCK_OP, LINEAR_OP, QDIT_DOMAIN


class AbstractLinear(nn.Module):
    """A linear without parameters: [..., K] → [..., N], traced as one `qdit::GroupQuantLinear`."""

    def __init__(self, name: str, out_features: int) -> None:
        super().__init__()
        self.name = name
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            f"{QDIT_DOMAIN}::{LINEAR_OP}",
            [x],
            attrs={"layer": self.name},
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=1,
        )


class TabulatedTimesteps(nn.Module):
    """The sinusoidal embedding [B] → [B, C] of diffusers' `Timesteps`, frequencies as a table.

    An exporter would fold the frequencies exp(…) with another library's exponential. One unit in
    the last place of a frequency, times a timestep of 999, is an error of 6e-5 in the angle: far
    above every rounding error of the denoiser. So the table is computed here, by torch.
    """

    frequencies: Tensor

    def __init__(self, timesteps: Any) -> None:
        super().__init__()
        half = timesteps.num_channels // 2
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32)
        table = torch.exp(exponent / (half - timesteps.downscale_freq_shift))
        self.register_buffer("frequencies", table.unsqueeze(0), persistent=False)
        self.scale = timesteps.scale
        self.sine_first = not timesteps.flip_sin_to_cos

    def forward(self, timesteps: Tensor) -> Tensor:
        angles = timesteps.unsqueeze(1).float() * self.frequencies
        if self.scale != 1:
            angles = self.scale * angles
        parts = [torch.sin(angles), torch.cos(angles)]
        return torch.cat(parts if self.sine_first else parts[::-1], dim=-1)

    def _apply(self, fn: Any, recurse: bool = True) -> TabulatedTimesteps:
        """Stay in float32 through `.to(dtype)`, as diffusers computes this in every dtype."""
        return self


def abstract_linears(denoiser: nn.Module, linears: Iterable[LinearSpec]) -> None:
    """Replace every linear of `linears` by its stand-in, in place."""
    for spec in linears:
        replace_linear(denoiser, spec.name, AbstractLinear(spec.name, spec.out_features))


def tabulate_timesteps(denoiser: nn.Module) -> None:
    """Replace diffusers' `Timesteps` modules, in place; one used at several places stays one."""
    from diffusers.models.embeddings import Timesteps

    made: dict[int, TabulatedTimesteps] = {}
    for path, module in list(denoiser.named_modules(remove_duplicate=False)):
        # odd widths are padded by diffusers; no published model has one
        if isinstance(module, Timesteps) and module.num_channels % 2 == 0:
            table = made.setdefault(id(module), TabulatedTimesteps(module))
            replace_linear(denoiser, path, table)


def mark_blocks(denoiser: nn.Module, blocks: Iterable[nn.Module]) -> list[str]:
    """Trace a `qdit::BlockOutput` identity after every block; return the blocks' paths in order."""
    paths = {id(module): path for path, module in denoiser.named_modules()}
    marked = []
    for block in blocks:
        path = paths[id(block)]
        block.register_forward_hook(_marker(path))
        marked.append(path)
    return marked


def _marker(path: str) -> Any:
    def mark(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            f"{QDIT_DOMAIN}::{BLOCK_OP}",
            [output],
            attrs={"block": path},
            dtype=output.dtype,
            shape=output.shape,
            version=1,
        )

    return mark
