"""Put weights into a family's denoiser, holding little more than one copy of them in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from ..families.base import Family

_SHOWN = 3


def build_empty(family: Family, config: dict[str, Any]) -> nn.Module:
    """A denoiser whose parameters lie on the meta device."""
    with torch.device("meta"):
        return family.build(config)


def fill_parameters(denoiser: nn.Module, value_of: Callable[[str, Tensor], Tensor]) -> None:
    """Replace each parameter by `value_of(name, parameter)`; tied parameters are asked for once."""
    for name, parameter in list(denoiser.named_parameters()):
        path, _, attribute = name.rpartition(".")
        value = nn.Parameter(value_of(name, parameter), requires_grad=False)
        denoiser.get_submodule(path).register_parameter(attribute, value)


def assemble(
    family: Family,
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    where: str,
    device: torch.device | str,
    blocks: int | None,
) -> nn.Module:
    """A float32 denoiser that holds exactly `tensors`, by diffusers' names, on `device`.

    Tensors may be memory-mapped: float32 ones are taken as they are, others converted one by one.
    Raises `InputError`, naming `where`, unless every tensor has its place, none is missing, and
    each has the right shape and a floating-point dtype.
    """
    denoiser = build_empty(family, config)
    check_names(dict(denoiser.named_parameters()), tensors, where)
    if blocks is not None:
        family.keep_blocks(denoiser, blocks)

    def value_of(name: str, parameter: Tensor) -> Tensor:
        value = tensors[name]
        if value.shape != parameter.shape:
            raise InputError(
                f"{name} must have shape {list(parameter.shape)} by the config, "
                f"got {list(value.shape)} in {where}"
            )
        if not value.is_floating_point():
            raise InputError(f"{name} must be floating-point, got {value.dtype} in {where}")
        return value.detach()

    fill_parameters(denoiser, value_of)
    family.tie_shared_modules(denoiser)
    return denoiser.to(device=device, dtype=torch.float32)


def check_names(expected: Iterable[str], given: Iterable[str], where: str) -> None:
    """Raise `InputError` unless both hold the same names."""
    expected, given = set(expected), set(given)
    if missing := sorted(expected - given):
        raise InputError(f"{where} lacks {_some(missing)}; is the file complete, and of a DiT?")
    if unknown := sorted(given - expected):
        raise InputError(f"{where} holds {_some(unknown)}, which this architecture does not have")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def config_of(denoiser: nn.Module) -> dict[str, Any]:
    """The denoiser's config as JSON data, `_class_name` included and diffusers' notes left out."""
    config: Any = denoiser.config
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    return {"_class_name": type(denoiser).__name__, **public}
