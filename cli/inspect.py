"""The command `qdit-inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import common_flags
from .entry import console_entry


def inspect(
    artifact: Annotated[
        Path, typer.Argument(help="An exported folder, an .onnx file, or an .engine.")
    ],
    json_output: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of tables.")
    ] = False,
    tensorrt: Annotated[
        str | None,
        typer.Option(
            metavar="VERSION",
            help="Check an .onnx file against the rules of this TensorRT (8.6, 10, 10.9, 11): one "
            "line a violation, and exit code 1 if there is any.",
            show_default=False,
        ),
    ] = None,
    version: common_flags.Version = False,
) -> int:
    """Show each linear's shape, bits, groups and bytes, totals, what each target can run, and the
    precision that a TensorRT engine's linears really run in.

    Examples:

      qdit-inspect build/demo-w4a8

      qdit-inspect build/demo-w8a8/tensorrt/tensorrt-int8.onnx --tensorrt 8.6

      qdit-inspect build/demo-w8a8/tensorrt/tensorrt-int8.engine
    """
    from ..engines import inspection

    if tensorrt is not None:
        broken = inspection.broken_rules(artifact, tensorrt)
        lines = inspection.rules_as_json(broken) if json_output else "\n".join(map(str, broken))
        typer.echo(lines or f"{artifact}: every rule of TensorRT {tensorrt} is kept")
        return 1 if broken else 0
    found = inspection.inspect_artifact(artifact)
    if json_output:
        typer.echo(inspection.as_json(found), nl=False)
    else:
        inspection.print_tables(found, Console())
    return 0


inspect_command = console_entry(inspect)
