"""The one error that the recipes turn into a one-line message and exit code 2."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer


class RecipeError(ValueError):
    """Bad input; the message names the rule, the value got and the next action."""


@contextmanager
def exit_on_recipe_error() -> Iterator[None]:
    """Print a ``RecipeError`` as one line on stderr and leave with exit code 2."""
    try:
        yield
    except RecipeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
