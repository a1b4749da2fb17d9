"""From the flags that were given to the values that the floors below take."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import typer

from ..engines.options import Options, build_options, read_config
from ..errors import InputError
from ..progress import Terminal

Kind = TypeVar("Kind", bound=Options)


def options_of(context: typer.Context, kind: type[Kind], config: Path | None = None) -> Kind:
    """The options model `kind` from the config file and the flags. `InputError` for bad ones."""
    options: Kind = build_options(kind, values_of(context, kind.model_fields, config))
    return options


def values_of(
    context: typer.Context, names: Iterable[str], config: Path | None = None
) -> dict[str, Any]:
    """Options called `names`: the config file's, overridden by the flags that were really given."""
    values = read_config(config) if config else {}
    for name in names:
        if name not in context.params:
            continue
        source = context.get_parameter_source(name)
        # compared by name: newer typer versions bring an enumeration of their own
        given = source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")
        if given:
            values[name] = parsed(name, context.params[name])
    return values


def batch_sizes(text: str) -> tuple[int, ...]:
    """Batch sizes separated by commas: '1,8' is (1, 8). `InputError` for anything else."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"batch must be numbers such as 1,8, got {text!r}") from error
    if min(numbers) < 1:
        raise InputError(f"every batch size must be at least 1, got {text!r}")
    return numbers


def terminal_of(verbose: bool, quiet: bool) -> Terminal:
    """Progress as loud as --verbose and --quiet ask; --quiet wins."""
    return Terminal(0 if quiet else 2 if verbose else 1)


def parsed(name: str, value: Any) -> Any:
    """Numbers where a flag takes a number or a word ('channel', 'token', 'auto')."""
    if name == "fid_samples" and value == "auto":
        return None
    if isinstance(value, str) and value.isdigit():
        return int(value)
    return value
