"""Inner values of the torch engine, for parity: what each quantized linear read and made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...calibrate.checkpoint import QuantizedCheckpoint
from ...errors import InputError
from ..kernels import reference
from ..parity_internals import ExposedValues
from .linears import IntegerPart, Part
from .source import Source


def exposed_values_of(checkpoint: QuantizedCheckpoint) -> ExposedValues:
    """Names of the inner values: '<linear>.input', '<linear>.output', '<block>.output'."""
    pairs = {
        spec.name: (f"{spec.name}.input", f"{spec.name}.output") for spec in checkpoint.linears
    }
    blocks = sorted({spec.block for spec in checkpoint.linears})
    return ExposedValues(
        pairs, tuple(_block_output(block) for block in blocks), quantized_inputs=True
    )


def _block_output(block: int) -> str:
    return f"transformer_blocks.{block}.output"


@contextmanager
def recorded(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    """Inner values `names` of the forwards run in this context, float32 arrays by name.

    A linear's input is what its product multiplied: the dequantized rows, where they are
    quantized. Its output is taken without the gate. Raises `InputError` for an unknown name.
    """
    found: dict[str, np.ndarray] = {}
    hooks = list(_hooks(module, set(names), found))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    if missing := sorted(set(names) - set(found)):
        raise InputError(f"the torch engine has no inner value {missing[0]!r}")


def _hooks(module: nn.Module, names: set[str], found: dict[str, np.ndarray]) -> Iterator[Any]:
    for part in module.modules():
        if isinstance(part, Part):
            yield part.register_forward_hook(_keep_part(names, found))
    own: Any = module
    for index, block in enumerate(own.blocks):
        if (name := _block_output(index)) in names:
            yield block.register_forward_hook(_keep_block(name, found))


def _keep_part(names: set[str], found: dict[str, np.ndarray]) -> Any:
    def keep(part: Part, given: tuple[Any, ...], output: Tensor) -> None:
        source, gate, dtype = given
        wanted = [spec for spec in part.specs if f"{spec.name}.output" in names]
        if not wanted:
            return
        plain = output if gate is None else part.forward(source, None, dtype)
        read = _array(_read(part, source))
        pieces = plain.split([spec.out_features for spec in part.specs], dim=1)
        for spec, piece in zip(part.specs, pieces, strict=True):
            if spec in wanted:
                found[f"{spec.name}.input"] = read
                found[f"{spec.name}.output"] = _array(piece)

    return keep


def _read(part: Part, source: Source) -> Tensor:
    if isinstance(part, IntegerPart):
        return reference.dequantized_rows(source.rows(part.rows_kind))
    return source.value


def _keep_block(name: str, found: dict[str, np.ndarray]) -> Any:
    def keep(_block: nn.Module, given: tuple[Tensor, Tensor], output: Tensor) -> None:
        images = len(given[1])
        found[name] = _array(output.unflatten(0, (images, -1)))

    return keep


def _array(value: Tensor) -> np.ndarray:
    array: np.ndarray = value.to(torch.float32).cpu().numpy()
    return array
