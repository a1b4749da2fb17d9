"""The denoiser of a checkpoint: its shapes without memory, and its modules without weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .artifact_errors import InvalidConfigError, InvalidTieError
from .families.base import Family
from .simulate import replace_linear

# SD3's table of 192×192 positions by 1536 channels, the largest of a published DiT, has 216 MiB.
MAX_BUFFER_BYTES = 1 << 28
# FLUX, the deepest published DiT, has 57 blocks.
MAX_LAYERS = 512
# Schedulers make tables with one entry a training step; 1000 is usual.
MAX_SCHEDULER_INTEGER = 1_000_000


def outline(family: Family, config: dict[str, Any], tensor_count: int) -> nn.Module:
    """The denoiser of `config` in fake tensors: every shape is there, nothing is allocated.

    `tensor_count` is what the tensor file holds: no more layers than that can be meant, and
    building them is the one cost that fake tensors leave. Raises `InvalidConfigError`.
    """
    most = min(tensor_count, MAX_LAYERS)
    for key, value in config.items():
        if key.endswith("layers") and isinstance(value, int) and value > most:
            raise InvalidConfigError(
                f"the config's {key} must be at most {most}, for {tensor_count} stored tensors, "
                f"got {value}"
            )
    if not family.matches(config):
        raise InvalidConfigError(
            f"the config is not one of family {family.name}: _class_name is "
            f"{config.get('_class_name')!r}"
        )
    try:
        with FakeTensorMode(), torch.device("meta"):
            denoiser = family.build(config)
    except Exception as error:  # a hostile config makes constructors fail in any way
        raise InvalidConfigError(f"the config cannot be built: {_first_line(error)}") from error
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in denoiser.buffers())
    if buffers > MAX_BUFFER_BYTES:
        raise InvalidConfigError(
            f"the config's fixed tables may take {MAX_BUFFER_BYTES} bytes, they take {buffers}"
        )
    return denoiser


def check_scheduler_config(config: Mapping[str, Any]) -> None:
    """Raise `InvalidConfigError` for integers that would make a scheduler build huge tables."""
    for key, value in config.items():
        if isinstance(value, int) and abs(value) > MAX_SCHEDULER_INTEGER:
            raise InvalidConfigError(
                f"the scheduler config's {key} must be at most {MAX_SCHEDULER_INTEGER}, got {value}"
            )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def stored_shapes(denoiser: nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameters and persistent buffers by name with their shapes, shared ones once."""
    return {name: tuple(value.shape) for name, value in stored_tensors(denoiser).items()}


def stored_tensors(denoiser: nn.Module, *, shared_once: bool = True) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, a shared one by its first name or by all."""
    tensors: dict[str, Tensor] = dict(denoiser.named_parameters(remove_duplicate=shared_once))
    persistent = denoiser.state_dict(keep_vars=True).keys()
    buffers = denoiser.named_buffers(remove_duplicate=shared_once)
    return tensors | {name: buffer for name, buffer in buffers if name in persistent}


def find_ties(denoiser: nn.Module) -> dict[str, str]:
    """Modules with weights that stand at several places: {later path: first path}."""
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for path, module in denoiser.named_modules(remove_duplicate=False):
        inside_a_tie = any(path.startswith(f"{tied}.") for tied in ties)
        if inside_a_tie or next(module.parameters(), None) is None:
            continue
        original = first.setdefault(id(module), path)
        if original != path:
            ties[path] = original
    return ties


def apply_ties(denoiser: nn.Module, ties: Mapping[str, str], linears: Mapping[str, Any]) -> None:
    """Put the module at each original path at its tied path as well.

    Raises `InvalidTieError` unless both exist, are of one class and hold the same shapes, the
    original is no tied path itself, neither contains the other, and no quantizable linear lies
    inside.
    """
    for path, original in ties.items():
        _check_tie(denoiser, path, original, ties, linears)
    for path, original in ties.items():
        replace_linear(denoiser, path, denoiser.get_submodule(original))


def _check_tie(
    denoiser: nn.Module,
    path: str,
    original: str,
    ties: Mapping[str, str],
    linears: Mapping[str, Any],
) -> None:
    def refuse(reason: str) -> InvalidTieError:
        return InvalidTieError(f"the tie of {path!r} to {original!r} is impossible: {reason}")

    if not path or not original:
        raise refuse("a path is empty")
    try:
        modules = denoiser.get_submodule(path), denoiser.get_submodule(original)
    except AttributeError as error:
        raise refuse("the model has no such module") from error
    if any(_overlap(original, tied) for tied in ties):
        raise refuse("the original is tied itself or overlaps a tied module")
    if any(tied != path and _overlap(path, tied) for tied in ties):
        raise refuse("it overlaps another tie")
    if any(_overlap(path, name) for name in linears):
        raise refuse("a quantizable linear lies inside")
    if type(modules[0]) is not type(modules[1]) or (
        stored_shapes(modules[0]) != stored_shapes(modules[1])
    ):
        raise refuse("the modules differ")


def _overlap(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def empty_denoiser(family: Family, config: dict[str, Any], ties: Mapping[str, str]) -> nn.Module:
    """The denoiser with its parameters on the meta device, fixed buffers real, ties in place."""
    with init_empty_weights(include_buffers=False):
        denoiser = family.build(config)
    for path, original in ties.items():
        replace_linear(denoiser, path, denoiser.get_submodule(original))
    return denoiser.eval().requires_grad_(False)


def load_parameters(
    denoiser: nn.Module,
    parameters: Mapping[str, Tensor],
    device: torch.device | str,
    dtype: torch.dtype,
) -> None:
    """Put `parameters` in place, one at a time, converted to `device` and `dtype`."""
    for name in parameters:
        path, _, attribute = name.rpartition(".")
        module = denoiser.get_submodule(path)
        value = parameters[name].to(device=device, dtype=dtype)
        if attribute in module._buffers:
            module._buffers[attribute] = value
        else:
            module.register_parameter(attribute, nn.Parameter(value, requires_grad=False))
