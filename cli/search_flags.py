"""Flags of `SearchOptions`: how each linear's groups are found."""

from __future__ import annotations

from typing import Annotated

import typer

Search = Annotated[
    str | None,
    typer.Option(
        help="Find each linear's groups: none, sensitivity (measure, then solve) or evolutionary "
        "(the paper's). Default: none, or sensitivity where --budget or --pareto is given.",
        show_default=False,
    ),
]
Budget = Annotated[
    str,
    typer.Option(
        metavar="KIND=VALUE",
        help="What the found plan may cost: effective-bits=4.25, bytes=…, bitops=… or "
        "latency-ms=…; a VALUE such as g128 is what that uniform plan costs.",
    ),
]
Pareto = Annotated[
    bool,
    typer.Option("--pareto", help="Write the front, cost against quality, and its plans."),
]
SearchImages = Annotated[
    int | None,
    typer.Option(
        help="Images that judge a plan. Default: 16 on a CPU, 256 on a GPU; evolutionary 800.",
        show_default=False,
    ),
]
SearchRefine = Annotated[
    int | None,
    typer.Option(
        help="Best plans to quantize for real and judge by images; 1 takes the first. Default: 3 "
        "on a CPU, 8 on a GPU; evolutionary 1.",
        show_default=False,
    ),
]
RefineBy = Annotated[str, typer.Option(help="What judges them: psnr (paired) or fid.")]
SearchPopulation = Annotated[int, typer.Option(help="Evolutionary: plans a generation.")]
SearchGenerations = Annotated[int, typer.Option(help="Evolutionary: generations after the first.")]
SearchWorkers = Annotated[
    int | None,
    typer.Option(
        help="Evolutionary: processes or Ray actors. Default: one a GPU; one on a CPU.",
        show_default=False,
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        help="Evolutionary: evaluate on this Ray cluster; 'local' starts one here "
        "(pip install qdit[cluster]).",
        show_default=False,
    ),
]
LatencyTarget = Annotated[
    str,
    typer.Option(
        help="What latency-ms is measured on: qdq, onnxruntime, torch (the simulation), or "
        "torch-quantized (the CUDA kernels)."
    ),
]
