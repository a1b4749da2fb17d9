"""What the rest of the project needs to know of a model family. One file per family joins here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..plan import LinearSpec

# (x [B, C, H, W], timestep int64 [B], class label int64 [B]) → predicted noise [B, C, H, W].
# Sampling, FID, parity and serving take any such callable, whatever engine is behind it.
Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class InputSpec:
    """One input of the exported denoiser. `shape` is without the leading batch dimension."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class BlockInputs:
    """What a block reads: the hidden states [B, T, D], and what all blocks share, by name."""

    hidden_states: Tensor
    shared: dict[str, Tensor]


@dataclass(frozen=True)
class SmoothingSite:
    """Where x = norm(h) · (1 + scale) + shift is made, and what reads it (`smoothing.py`).

    modulation: the linear whose output rows `shift_rows` and `scale_rows` are shift and scale;
    consumers: the linears that read x, called `input_name`. Nothing else may read it.
    """

    input_name: str
    modulation: str
    shift_rows: slice
    scale_rows: slice
    consumers: tuple[str, ...]


class Family(Protocol):
    """A model family. `denoiser` is always the family's diffusers module."""

    name: str
    output_name: str
    class_names: tuple[str, ...]  # the diffusers classes it covers, for messages

    def matches(self, config: dict[str, Any]) -> bool:
        """Whether a diffusers config.json describes a model of this family."""

    def build(self, config: dict[str, Any]) -> nn.Module:
        """A denoiser of this config in eval mode, weights unset or random, on the default device.

        Under `torch.device("meta")` only the parameters are meta: buffers that the config decides
        (positional embeddings) are real, so that assigning parameters completes the module.
        """

    def tie_shared_modules(self, denoiser: nn.Module) -> None:
        """Make modules that hold equal weights in every block one object (memory, one compute).

        Meta tensors have no values to differ in: on the meta device such modules are always tied.
        """

    def keep_blocks(self, denoiser: nn.Module, count: int) -> None:
        """Drop all blocks after the first `count` (for benchmarks); the config follows."""

    def blocks(self, denoiser: nn.Module) -> Sequence[nn.Module]:
        """The transformer blocks in order."""

    def linears(self, denoiser: nn.Module) -> list[LinearSpec]:
        """The linears offered for quantization, in model order."""

    def smoothing_sites(self, denoiser: nn.Module) -> Sequence[SmoothingSite]:
        """Where SmoothQuant's factors fold into adaLN; empty where a family has no such place."""

    def inputs(self, denoiser: nn.Module) -> tuple[InputSpec, ...]:
        """The exported inputs, in the order of `forward`."""

    def example_inputs(
        self, denoiser: nn.Module, batch: int, generator: torch.Generator
    ) -> tuple[Tensor, ...]:
        """Random inputs of the right shapes, dtypes and ranges, on the CPU in float32/int64."""

    def forward(self, denoiser: nn.Module, *inputs: Tensor) -> Tensor:
        """The raw output [B, out channels, H, W] (learned sigma included)."""

    def before_blocks(self, denoiser: nn.Module, *inputs: Tensor) -> BlockInputs:
        """Everything up to the first block."""

    def run_block(self, block: nn.Module, inputs: BlockInputs) -> Tensor:
        """One block: [B, T, D] → [B, T, D]."""

    def after_blocks(self, denoiser: nn.Module, inputs: BlockInputs) -> Tensor:
        """From what the last block gave [B, T, D] to the raw output, as `forward` ends."""

    def noise_prediction(self, denoiser: nn.Module, output: Tensor) -> Tensor:
        """The epsilon part [B, C, H, W] of the raw output (drops a learned sigma)."""

    def null_label(self, denoiser: nn.Module) -> int:
        """The class label that means 'no class' for classifier-free guidance."""

    def class_count(self, denoiser: nn.Module) -> int:
        """How many classes there are, the null label not counted."""
