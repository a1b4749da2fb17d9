"""Model families: what is quantized in each, and how its denoiser is run.

A new family (PixArt, SD3, FLUX) joins by adding one file to this folder: a class that has every
member of the `Family` protocol (base.py), and a module constant

    FAMILY: Family = ThatFamily()

Every module here except `base` is imported and its `FAMILY` registered; nothing else is edited.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ...errors import InputError
from .base import Family


def _discover() -> dict[str, Family]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f".{name}", __name__) for name in names if name != "base"]
    families: list[Family] = [module.FAMILY for module in modules]
    return {family.name: family for family in families}


FAMILIES: Mapping[str, Family] = MappingProxyType(_discover())


def family_of(config: dict[str, Any]) -> Family:
    """The family whose denoiser a diffusers config.json describes, else `InputError`."""
    for family in FAMILIES.values():
        if family.matches(config):
            return family
    supported = ", ".join(cls for family in FAMILIES.values() for cls in family.class_names)
    raise InputError(
        f"no model family for a config of class {config.get('_class_name')!r}; "
        f"the supported classes are {supported}"
    )


def family_named(name: str) -> Family:
    """The family called `name` ('dit'); `InputError` if there is none."""
    if name not in FAMILIES:
        raise InputError(f"no model family {name!r}; the families are {', '.join(FAMILIES)}")
    return FAMILIES[name]
