"""The command `qdit-bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..engines.options import SchemeOptions
from . import common_flags, scheme_flags, session_flags
from .entry import command_line, console_entry
from .values import batch_sizes, options_of, terminal_of


def bench(
    context: typer.Context,
    source: Annotated[
        str, typer.Argument(help="An exported folder, or a model such as random:DiT-XL/2.")
    ],
    bits: scheme_flags.Bits = "w4a8",
    group_size: scheme_flags.GroupSize = "128",
    activation_group_size: scheme_flags.ActivationGroupSize = None,
    symmetric: scheme_flags.Symmetric = True,
    weight_symmetric: scheme_flags.WeightSymmetric = None,
    activation_symmetric: scheme_flags.ActivationSymmetric = None,
    scale_dtype: scheme_flags.ScaleDtype = "float16",
    scale_format: scheme_flags.ScaleFormat = "float",
    plan: scheme_flags.Plan = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8",
    blocks: Annotated[
        int | None, typer.Option(help="Keep only the first N blocks.", show_default=False)
    ] = None,
    targets: Annotated[
        str, typer.Option(help="What to time, separated by commas, side by side in one run.")
    ] = "fp32,qdq,torch",
    runs: Annotated[
        int, typer.Option(help="Fewest timed runs of each target and batch.", min=1)
    ] = 5,
    seconds: Annotated[
        float,
        typer.Option(help="Go on past --runs while this time for a batch size is not used up."),
    ] = 10.0,
    threads: common_flags.Threads = None,
    device: common_flags.Device = "auto",
    provider: session_flags.Provider = None,
    session_option: session_flags.SessionOption = None,
    provider_option: session_flags.ProviderOption = None,
    cpu_kernels: session_flags.CpuKernels = "auto",
    seed: common_flags.Seed = 0,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Then say where the time goes, by kind of operator."),
    ] = False,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the results; a plot goes beside it."),
    ] = None,
    verbose: common_flags.Verbose = False,
    quiet: common_flags.Quiet = False,
    version: common_flags.Version = False,
) -> int:
    """Time targets side by side in one run: latency, images a second, peak memory, file sizes.

    Examples:

      qdit-bench build/demo-w4a8 --batch 1,8

      qdit-bench random:DiT-XL/2 --bits w4a8 --blocks 4 --targets fp32,qdq,torch --json xl.json

      qdit-bench build/demo-w4a8 --targets fp32,onnxruntime,ort-dynamic --profile --json demo.json
    """
    from ..engines import bench_job

    scheme = options_of(context, SchemeOptions)
    with terminal_of(verbose, quiet) as terminal:
        bench_job.run_bench(
            source,
            scheme,
            batches=batch_sizes(batch),
            blocks=blocks,
            targets=tuple(name.strip() for name in targets.split(",") if name.strip()),
            runs=runs,
            seconds=seconds,
            threads=threads,
            device=device,
            seed=seed,
            profile=profile,
            provider=provider,
            session_options=session_option or (),
            provider_options=provider_option or (),
            cpu_kernels=cpu_kernels,
            json_file=json_file,
            command=command_line(),
            progress=terminal,
        )
    return 0


bench_command = console_entry(bench)
