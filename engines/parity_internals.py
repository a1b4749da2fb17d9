"""Inside the denoiser: each quantized linear on the same input, each block on the same model input.

The exported file names the values to look at in its metadata (`qdit.linears`, `qdit.blocks`); an
engine opened with these as extra outputs yields them all in one run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..calibrate.families.base import Family
from ..calibrate.simulate import QuantizedLinear
from ..errors import ArtifactError
from ..export.opsets import BLOCKS_KEY, LINEARS_KEY
from .parity_inputs import Step
from .parity_measure import Comparison, compare

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class ExposedValues:
    """Names of an engine's values: input and output of each linear, and each block's output.

    quantized_inputs: the inputs are what the products multiplied, already quantized, and not what
    came before.
    """

    linears: dict[str, tuple[str, str]]
    blocks: tuple[str, ...]
    quantized_inputs: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Every value once, in a fixed order: what to open the engine with."""
        values = [value for pair in self.linears.values() for value in pair]
        return tuple(dict.fromkeys([*values, *self.blocks]))


@dataclass(frozen=True)
class LinearError:
    """One quantized linear: engine against simulation on the very input the engine had.

    `own_error` is the relative error that float16 files must be allowed (`_float16_error`); None
    for float32 files, whose bound is a constant.
    """

    name: str
    role: str
    block: int
    comparison: Comparison
    own_error: float | None = None


@dataclass(frozen=True)
class BlockError:
    """Output [n, T, D] of one block after everything before it, the same model input for all."""

    block: int
    simulation: Comparison
    engine: Comparison | None = None


def exposed_values(path: Path) -> ExposedValues:
    """Read the metadata of an exported file (the weights are not loaded)."""
    try:
        model = onnx.load(path, load_external_data=False)
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        linears = json.loads(metadata[LINEARS_KEY])
        pairs = {name: (entry["input"], entry["output"]) for name, entry in linears.items()}
        return ExposedValues(pairs, tuple(json.loads(metadata[BLOCKS_KEY])))
    except (KeyError, ValueError, TypeError, AttributeError, OSError) as error:
        raise ArtifactError(
            f"{path} does not say which values its linears and blocks are "
            f"(metadata {LINEARS_KEY} and {BLOCKS_KEY}); export it with qdit"
        ) from error


@torch.inference_mode()
def linear_errors(
    simulation: nn.Module,
    family: Family,
    values: ExposedValues,
    arrays: Arrays,
    dtype: str = "float32",
) -> list[LinearError]:
    """Feed each simulated linear the input that the engine's linear had; compare the outputs.

    `simulation` is the float32 simulation, `arrays` one engine run. Linears that the plan leaves at
    16 bits are `nn.Linear` in both and are not listed.
    """
    errors = []
    for spec in family.linears(simulation):
        module = simulation.get_submodule(spec.name)
        if not isinstance(module, QuantizedLinear) or spec.name not in values.linears:
            continue
        if values.quantized_inputs:
            module = _without_quantizing_inputs(module)
        given, made = (torch.from_numpy(arrays[name]) for name in values.linears[spec.name])
        expected = module(given.to(module.weight))
        own = None if dtype == "float32" else _float16_error(module, given, expected)
        errors.append(LinearError(spec.name, spec.role, spec.block, compare(made, expected), own))
    return errors


def _without_quantizing_inputs(module: QuantizedLinear) -> QuantizedLinear:
    scheme = replace(module.scheme, activation_bits=16)
    return QuantizedLinear(scheme, module.quantized, module.bias, module.weight.dtype)


def _float16_error(module: QuantizedLinear, given: Tensor, expected: Tensor) -> float:
    """What float16 alone does to this linear, relative to `expected`: two independent parts.

    1. Computing it in float16 instead of float32.
    2. Not knowing its input: runtimes without float16 kernels (ONNX Runtime on a CPU) keep values
       in float32 from node to node, so that the input was within half a float16 step (2^-11 of
       each value) of the one they return, and activations near a tie round the other way.
    """
    half = torch.float16
    bias = None if module.bias is None else module.bias.to(half)
    device = module.weight.device
    narrow = QuantizedLinear(module.scheme, module.quantized.to(device), bias, half)
    computing = compare(narrow.to(device)(given.to(device, half)), expected)
    wide = given.to(module.weight)
    generator = torch.Generator().manual_seed(0)
    noise = (torch.rand(wide.shape, generator=generator) * 2 - 1).to(wide) * 2.0**-11
    unknown_input = compare(module(wide * (1 + noise)), expected)
    return math.hypot(computing.relative_error, unknown_input.relative_error)


@torch.inference_mode()
def block_outputs(
    denoiser: nn.Module, family: Family, step: Step, device: torch.device | str
) -> list[Tensor]:
    """The output of every block of a torch denoiser for one step's inputs, on the CPU."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output).detach().cpu())

    hooks = [block.register_forward_hook(keep) for block in family.blocks(denoiser)]
    try:
        family.forward(
            denoiser, step.x.to(device), step.timesteps.to(device), step.labels.to(device)
        )
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def block_errors(
    full: Sequence[Tensor], simulation: Sequence[Tensor], engine: Sequence[Tensor] | None
) -> list[BlockError]:
    """Simulation against full precision, and engine against simulation, block by block."""
    return [
        BlockError(
            block,
            compare(simulation[block], full[block]),
            None if engine is None else compare(engine[block], simulation[block]),
        )
        for block in range(len(full))
    ]


def engine_blocks(values: ExposedValues, arrays: Arrays) -> list[Tensor]:
    """The blocks' outputs of one engine run."""
    return [torch.from_numpy(np.asarray(arrays[name])) for name in values.blocks]
