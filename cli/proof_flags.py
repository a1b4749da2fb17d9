"""Flags of `ProofOptions`: how images are sampled, and what the gate allows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Steps = Annotated[int, typer.Option(help="Denoising steps of the sampler.")]
Guidance = Annotated[float, typer.Option(help="Classifier-free guidance; 1.0 is none.")]
Scheduler = Annotated[
    str | None,
    typer.Option(help="A diffusers scheduler class. Default: the model's own.", show_default=False),
]
FidSamples = Annotated[
    str,
    typer.Option(
        help="Image pairs for FID and PSNR; 'auto' takes what this device makes in about a "
        "minute an engine (16 … 10,000); 0 skips images."
    ),
]
FidFeatures = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Feature extractor: .onnx, or the TorchScript inception-2015-12-05.pt.",
        show_default=False,
    ),
]
Reference = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Reference statistics, .npz with mu and sigma.", show_default=False
    ),
]
MaxFidIncrease = Annotated[
    float | None,
    typer.Option(
        help="The gate: largest FID increase allowed. Default: 20 % of the full-precision FID.",
        show_default=False,
    ),
]
BatchSize = Annotated[
    int | None, typer.Option(help="Samples in one call. Default: by device.", show_default=False)
]
