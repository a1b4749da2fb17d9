"""What one linear holds, for the lowering passes: its scheme and its tensors, read on demand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

from torch import Tensor

from ..calibrate.checkpoint import QuantizedCheckpoint
from ..calibrate.checkpoint_model import stored_tensors
from ..calibrate.model import DiffusionModel
from ..calibrate.plan import LinearSpec
from ..calibrate.quantizers import QuantizedWeight
from ..calibrate.schemes import UNQUANTIZED_BITS, LayerScheme


@dataclass(frozen=True)
class LinearContents:
    """A linear's scheme and tensors.

    `quantized()` is its integers and scales where the scheme quantizes weights, `weight()` its
    matrix [N, K] where it does not. Both are called as the file is written, not before, and the
    latest result is kept, so that integers, scales and zero points cost one unpacking.
    """

    spec: LinearSpec
    scheme: LayerScheme
    bias: Tensor | None
    quantized: Callable[[], QuantizedWeight]
    weight: Callable[[], Tensor]


def checkpoint_contents(checkpoint: QuantizedCheckpoint) -> dict[str, LinearContents]:
    """The contents of every linear of a checkpoint, by name in model order."""
    read = lru_cache(maxsize=1)(checkpoint.weights.__getitem__)
    return {
        spec.name: LinearContents(
            spec,
            checkpoint.plan[spec.name],
            checkpoint.parameters[f"{spec.name}.bias"] if spec.has_bias else None,
            quantized=partial(read, spec.name),
            weight=partial(checkpoint.parameters.__getitem__, f"{spec.name}.weight"),
        )
        for spec in checkpoint.linears
    }


def full_precision_contents(model: DiffusionModel) -> dict[str, LinearContents]:
    """The contents of every linear of a model, unquantized, by name in model order."""
    scheme = LayerScheme(weight_bits=UNQUANTIZED_BITS, activation_bits=UNQUANTIZED_BITS)
    tensors = stored_tensors(model.denoiser)
    return {
        spec.name: LinearContents(
            spec,
            scheme,
            tensors[f"{spec.name}.bias"].detach().cpu() if spec.has_bias else None,
            quantized=partial(_not_quantized, spec.name),
            weight=partial(_host_copy, tensors, f"{spec.name}.weight"),
        )
        for spec in model.linears
    }


def _host_copy(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    return tensors[name].detach().cpu()


def _not_quantized(name: str) -> QuantizedWeight:
    raise ValueError(f"{name} is not quantized")
