"""The engine `torch`: a checkpoint in PyTorch, its linears on the CUDA kernels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ...calibrate.checkpoint import QuantizedCheckpoint
from ...calibrate.families.base import Denoiser, Family
from ...calibrate.graphed import GraphedForward
from ...errors import InputError
from ..engine import Arrays, LoadedEngine, TensorSpec, check_inputs
from .dit import FusedDiT
from .exposed import recorded
from .linears import LinearBuilder

ComputeDtype = Literal["float16", "bfloat16"]


class TorchEngine(LoadedEngine):
    """A checkpoint on the kernels; weights are packed once, at construction.

    * `device`: 'cuda', 'cuda:1', or 'cpu', where every kernel is computed by its reference in
      torch: for checking, far slower than anything else.
    * `dtype`: of everything that is not an integer: float16, or bfloat16 for models whose values
      overflow float16.
    * `graphs`: capture the forward once for each batch size as a CUDA graph (CUDA only).
    * `extra_outputs`: inner values that `infer` returns as well (`exposed.exposed_values_of`);
      with them every forward runs without a graph, and each gated product twice.

    Raises `InputError` for a family or a linear that the kernels do not compute.
    """

    def __init__(
        self,
        checkpoint: QuantizedCheckpoint | Path,
        *,
        device: str | torch.device = "cuda",
        dtype: ComputeDtype = "float16",
        graphs: bool = True,
        extra_outputs: Sequence[str] = (),
    ) -> None:
        if dtype not in get_args(ComputeDtype):
            choices = " or ".join(get_args(ComputeDtype))
            raise InputError(f"the torch engine computes in {choices}, got {dtype!r}")
        if isinstance(checkpoint, Path):
            checkpoint = QuantizedCheckpoint.read(checkpoint)
        self.device = torch.device(device)
        self.family: Family = checkpoint.family
        self._dtype: torch.dtype = getattr(torch, dtype)
        skeleton = checkpoint.skeleton()
        self._inputs = tuple(
            TensorSpec(spec.name, _numpy_dtype(spec.dtype), ("batch", *spec.shape))
            for spec in self.family.inputs(skeleton)
        )
        config: Any = skeleton.config
        size = config.sample_size
        self._outputs = (
            TensorSpec(
                self.family.output_name,
                np.dtype(np.float32),
                ("batch", config.out_channels, size, size),
            ),
        )
        builder = LinearBuilder(
            checkpoint.plan, checkpoint.weights, skeleton, self.device, self._dtype
        )
        self.module: FusedDiT | None = FusedDiT(
            self.family, skeleton, builder, self.device, self._dtype
        )
        self._outline = skeleton
        self._call: Any = self.module
        self._extra = tuple(extra_outputs)
        if graphs and not self._extra and self.device.type == "cuda":
            self._call = GraphedForward(lambda *inputs: (self._open()(*inputs),), lambda: None)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, scales, biases and tables on the device."""
        return self._open().weight_bytes

    def run(self, *inputs: Tensor) -> Tensor:
        """The raw output [B, out channels, H, W] in the engine's dtype, from tensors on its device.

        No copy to the host; with graphs the result is a copy of the graph's own output.
        """
        self._open()
        made = self._call(*inputs)
        output: Tensor = made[0] if isinstance(made, tuple) else made
        return output

    def infer(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """All outputs by name, float32, extra ones last. Raises `InputError` for inputs that do
        not fit, and for extra outputs that there are not."""
        check_inputs(self._inputs, inputs)
        given = [torch.from_numpy(inputs[spec.name]).to(self.device) for spec in self._inputs]
        if not self._extra:
            return {self.family.output_name: self.run(*given).float().cpu().numpy()}
        with recorded(self._open(), self._extra) as found:
            output = self.run(*given).float().cpu().numpy()
        return {self.family.output_name: output} | {name: found[name] for name in self._extra}

    def as_denoiser(self, family: Family, config: dict[str, Any]) -> Denoiser:
        """This engine for the sampling loop: tensors in and out, in the dtype and device of x."""

        def call(x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
            given = (value.to(self.device) for value in (x.float(), timestep.long(), label.long()))
            noise = family.noise_prediction(self._outline, self.run(*given))
            return noise.to(device=x.device, dtype=x.dtype)

        return call

    def close(self) -> None:
        """Free the weights and the graphs."""
        self.module = None
        self._call = None

    def _open(self) -> FusedDiT:
        if self.module is None:
            raise InputError("the torch engine is closed; open it again")
        return self.module


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    return torch.empty(0, dtype=dtype).numpy().dtype
