"""The command `qdit-tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..engines.options import SchemeOptions
from . import common_flags, scheme_flags
from .entry import console_entry
from .values import batch_sizes, options_of, terminal_of


def tune(
    context: typer.Context,
    source: Annotated[
        str | None,
        typer.Argument(
            help="An exported folder, or a model such as random:DiT-XL/2. Nothing: the demo.",
            show_default=False,
        ),
    ] = None,
    bits: scheme_flags.Bits = "w4a8",
    group_size: scheme_flags.GroupSize = "128",
    activation_group_size: scheme_flags.ActivationGroupSize = None,
    symmetric: scheme_flags.Symmetric = True,
    weight_symmetric: scheme_flags.WeightSymmetric = None,
    activation_symmetric: scheme_flags.ActivationSymmetric = None,
    scale_dtype: scheme_flags.ScaleDtype = "float16",
    scale_format: scheme_flags.ScaleFormat = "float",
    plan: scheme_flags.Plan = None,
    batch: Annotated[
        str, typer.Option(help="Images in one call of the denoiser, separated by commas.")
    ] = "1,8,16,64",
    device: Annotated[str, typer.Option(help="auto, cuda or cuda:N.")] = "auto",
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Table to write. Default: this GPU's own in the cache, which the engine reads.",
            show_default=False,
        ),
    ] = None,
    verbose: common_flags.Verbose = False,
    quiet: common_flags.Quiet = False,
    version: common_flags.Version = False,
) -> int:
    """Time the CUDA kernels' tiles for a model on this GPU and keep the fastest.

    The kernels run without this, on tiles that were measured on an H100 or that a rule chooses.
    Results are the same to the bit whatever the tile.

    Examples:

      qdit-tune build/DiT-XL-2-256-w4a8 --batch 16,64

      qdit-tune random:DiT-XL/2 --bits w8a8 --activation-group-size token
    """
    from ..engines import tune_job

    scheme = options_of(context, SchemeOptions)
    with terminal_of(verbose, quiet) as terminal:
        tune_job.run_tune(
            source,
            scheme,
            batches=batch_sizes(batch),
            device=device,
            output=output,
            progress=terminal,
        )
    return 0


tune_command = console_entry(tune)
