"""The commands' flags against the options that read them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import pytest

from qdit.cli.bench import bench
from qdit.cli.export import export
from qdit.cli.serve import serve
from qdit.cli.tune import tune
from qdit.cli.validate import validate
from qdit.cli.values import parsed
from qdit.engines.options import ExportOptions, Options, SchemeOptions, ValidateOptions
from qdit.serve.settings import SETTING_NAMES, make_settings

READ_BY = [
    pytest.param(export, ExportOptions, id="export"),
    pytest.param(validate, ValidateOptions, id="validate"),
    pytest.param(bench, SchemeOptions, id="bench"),
    pytest.param(tune, SchemeOptions, id="tune"),
]


def defaults_of(command: Callable[..., int], names: set[str]) -> dict[str, Any]:
    """Default values of the flags called `names`, but for those that show none."""
    parameters = inspect.signature(command).parameters
    found = {name: parsed(name, parameters[name].default) for name in names & set(parameters)}
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize(("command", "kind"), READ_BY)
def test_every_option_has_a_flag(command: Callable[..., int], kind: type[Options]) -> None:
    assert set(kind.model_fields) <= set(inspect.signature(command).parameters)


@pytest.mark.parametrize(("command", "kind"), READ_BY)
def test_the_default_that_help_shows_is_the_one_that_is_read(
    command: Callable[..., int], kind: type[Options]
) -> None:
    shown = defaults_of(command, set(kind.model_fields))
    assert shown
    assert kind.model_validate(shown).model_dump() == kind().model_dump()


def test_the_defaults_that_the_help_of_serve_shows_are_those_that_are_read() -> None:
    shown = defaults_of(serve, set(SETTING_NAMES) - {"folder"})
    assert shown
    assert make_settings(folder="x", **shown) == make_settings(folder="x")


@pytest.mark.parametrize("command", [bench, tune], ids=lambda command: command.__name__)
def test_the_flags_of_a_scheme_say_the_same_in_every_command(command: Callable[..., int]) -> None:
    hints, expected = (get_type_hints(one, include_extras=True) for one in (command, export))
    for name in SchemeOptions.model_fields:
        assert hints[name] is expected[name], f"--{name}: take it from cli/scheme_flags.py"
