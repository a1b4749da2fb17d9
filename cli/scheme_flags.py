"""Flags of `SchemeOptions`: how the linears are quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Bits = Annotated[
    str, typer.Option(help="w8a8, w6a8, w4a8, w3a8, w4a6, w4a4, w8a16, w4a16 or 16/16.")
]
GroupSize = Annotated[
    str, typer.Option(help="Input channels that share a weight scale: 32 … 1152, or 'channel'.")
]
ActivationGroupSize = Annotated[
    str | None,
    typer.Option(
        help="Input channels that share an activation scale, or 'token'. Default: as --group-size.",
        show_default=False,
    ),
]
Symmetric = Annotated[
    bool, typer.Option("--symmetric/--asymmetric", help="Quantizer of weights and activations.")
]
WeightSymmetric = Annotated[
    bool | None,
    typer.Option(
        "--weight-symmetric/--weight-asymmetric",
        help="Overrides --symmetric/--asymmetric for the weights.",
        show_default=False,
    ),
]
ActivationSymmetric = Annotated[
    bool | None,
    typer.Option(
        "--activation-symmetric/--activation-asymmetric",
        help="Overrides --symmetric/--asymmetric for the activations.",
        show_default=False,
    ),
]
ScaleDtype = Annotated[str, typer.Option(help="Stored dtype of weight scales: float16 or float32.")]
ScaleFormat = Annotated[
    str,
    typer.Option(
        help="Weight scales: float, one a group; or integer, an integer 1 … 16 a group and one "
        "float a channel, so that weights of 4 bits or fewer become int8 "
        "(--bits w4a8 --activation-group-size token --scale-format integer)."
    ),
]
Plan = Annotated[
    Path | None,
    typer.Option(help="JSON file with schemes for single layers (docs/format.md).", metavar="FILE"),
]
