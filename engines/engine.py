"""What every runtime offers, so that sampling, parity and serving take any of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from ..errors import InputError

if TYPE_CHECKING:  # an engine needs no torch: not its import time, and not its memory
    from torch import Tensor

    from ..calibrate.families.base import Denoiser, Family

Arrays = Mapping[str, np.ndarray]
_Loaded = TypeVar("_Loaded", bound="LoadedEngine")

# Engines by the names that files and flags have for them, as people read them.
ENGINE_TITLES = {
    "onnxruntime": "ONNX Runtime",
    "onnxruntime-target": "ONNX Runtime (target)",
    "onnxruntime-cuda": "ONNX Runtime (CUDA's file)",
    "torch": "torch engine",
    "tensorrt": "TensorRT",
}


@dataclass(frozen=True)
class TensorSpec:
    """A model input or output. A dimension is a number, or the name of a dynamic one."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str, ...]


class Engine(Protocol):
    """A loaded model. Names, dtypes and shapes are the same in every runtime."""

    @property
    def input_specs(self) -> tuple[TensorSpec, ...]:
        """The inputs in the model's order."""

    @property
    def output_specs(self) -> tuple[TensorSpec, ...]:
        """The outputs in the model's order, extra ones last."""

    def infer(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """All outputs by name. Raises `InputError` for inputs that do not fit `input_specs`."""

    def close(self) -> None:
        """Free the model; `infer` may not be called afterwards."""


class LoadedEngine(ABC):
    """What engines have in common: their tensors, and that `with` closes them.

    A subclass sets `_inputs` and `_outputs`, and has the rest of `Engine`.
    """

    _inputs: tuple[TensorSpec, ...]
    _outputs: tuple[TensorSpec, ...]

    @property
    def input_specs(self) -> tuple[TensorSpec, ...]:
        return self._inputs

    @property
    def output_specs(self) -> tuple[TensorSpec, ...]:
        return self._outputs

    @abstractmethod
    def close(self) -> None:
        """Free the model; it may not be run afterwards."""

    def __enter__(self: _Loaded) -> _Loaded:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def check_inputs(specs: tuple[TensorSpec, ...], inputs: Arrays) -> None:
    """Raise `InputError` unless `inputs` are exactly those of `specs`, with one size a dimension.

    Runtimes differ in what they let pass; every engine refuses the same.
    """
    expected = {spec.name for spec in specs}
    if set(inputs) != expected:
        raise InputError(
            f"the model's inputs are {', '.join(sorted(expected))}, got {', '.join(sorted(inputs))}"
        )
    sizes: dict[str, int] = {}
    for spec in specs:
        array = inputs[spec.name]
        if array.dtype != spec.dtype:
            raise InputError(f"input {spec.name} must be {spec.dtype}, got {array.dtype}")
        fits = len(array.shape) == len(spec.shape) and all(
            size == (sizes.setdefault(dim, size) if isinstance(dim, str) else dim)
            for dim, size in zip(spec.shape, array.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join(
                f"{dim}={sizes[dim]}" if isinstance(dim, str) and dim in sizes else str(dim)
                for dim in spec.shape
            )
            raise InputError(f"input {spec.name} must be [{wanted}], got {list(array.shape)}")


def as_denoiser(engine: Engine, family: Family, config: dict[str, Any]) -> Denoiser:
    """Wrap an engine of a `family` model with this denoiser config for the sampling loop.

    The engine's first inputs are the denoiser's, in the family's order. The result is on the
    device and in the dtype of x.
    """
    import torch

    from ..calibrate.checkpoint_model import empty_denoiser

    outline = empty_denoiser(family, config, {})
    names = [spec.name for spec in family.inputs(outline)]

    def call(x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        given = (x.float(), timestep.long(), label.long())
        arrays = {
            name: tensor.detach().cpu().contiguous().numpy()
            for name, tensor in zip(names, given, strict=True)
        }
        output = torch.from_numpy(engine.infer(arrays)[family.output_name])
        return family.noise_prediction(outline, output).to(device=x.device, dtype=x.dtype)

    return call
