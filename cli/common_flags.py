"""Flags that mean the same in every command that has them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import __version__

Folder = Annotated[Path, typer.Argument(help="A folder that qdit-export wrote.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads. Default: all cores.", show_default=False)
]
Seed = Annotated[int, typer.Option(help="Seed of noise, labels and calibration.")]
Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help=".toml or .json with any of these options; flags win over it."
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say only errors.")]


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"qdit {__version__}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
]
