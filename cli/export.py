"""The command `qdit-export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..engines.options import ExportOptions
from . import common_flags, proof_flags, scheme_flags, search_flags, target_flags
from .entry import GATE_FAILED, command_line, console_entry
from .values import options_of, terminal_of


def export(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="What to export: nothing for the embedded demo; a diffusers folder or Hub id "
            "(facebook/DiT-XL-2-256); an original DiT .pt file; random:DiT-XL/2 for benchmarks.",
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
    search: search_flags.Search = None,
    budget: search_flags.Budget = "effective-bits=g128",
    pareto: search_flags.Pareto = False,
    search_images: search_flags.SearchImages = None,
    search_refine: search_flags.SearchRefine = None,
    refine_by: search_flags.RefineBy = "psnr",
    search_population: search_flags.SearchPopulation = 50,
    search_generations: search_flags.SearchGenerations = 10,
    search_workers: search_flags.SearchWorkers = None,
    ray_address: search_flags.RayAddress = None,
    latency_target: search_flags.LatencyTarget = "qdq",
    weights: Annotated[
        str, typer.Option(help="How weights are rounded: gptq, mse or nearest.")
    ] = "gptq",
    calib_samples: Annotated[int, typer.Option(help="Calibration samples for GPTQ.")] = 256,
    num_inference_steps: proof_flags.Steps = 20,
    guidance_scale: proof_flags.Guidance = 1.5,
    scheduler: proof_flags.Scheduler = None,
    fid_samples: proof_flags.FidSamples = "auto",
    fid_features: proof_flags.FidFeatures = None,
    reference: proof_flags.Reference = None,
    max_fid_increase: proof_flags.MaxFidIncrease = None,
    dtype: Annotated[str, typer.Option(help="Compute type of model.onnx.")] = "float32",
    opset: Annotated[int, typer.Option(help="ONNX opset of model.onnx, 21 … 24.")] = 21,
    target: target_flags.Targets = "",
    on_unsupported: target_flags.OnUnsupported = "stop",
    tensorrt_version: target_flags.TensorRtVersion = None,
    static_scales: target_flags.StaticScales = "mse",
    smooth: target_flags.Smooth = None,
    batch_profile: target_flags.BatchProfile = "1/8/32",
    optimization_level: target_flags.OptimizationLevel = None,
    workspace_mib: target_flags.WorkspaceMib = None,
    hardware_compatible: target_flags.HardwareCompatible = False,
    version_compatible: target_flags.VersionCompatible = False,
    weight_streaming: target_flags.WeightStreaming = False,
    refit: target_flags.Refit = False,
    allow_fallback: target_flags.AllowFallback = False,
    require_engine: target_flags.RequireEngine = False,
    device: common_flags.Device = "auto",
    batch_size: proof_flags.BatchSize = None,
    threads: common_flags.Threads = None,
    seed: common_flags.Seed = 0,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder to write. Default: build/<model>-<bits>.", show_default=False),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on from a killed run, or start over.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print plan, sizes and time estimate; write nothing.")
    ] = False,
    config: common_flags.Config = None,
    verbose: common_flags.Verbose = False,
    quiet: common_flags.Quiet = False,
    version: common_flags.Version = False,
) -> int:
    """Quantize a Diffusion Transformer, export it to ONNX, prove that quality holds.

    Examples:

      qdit-export --bits w4a8

      qdit-export facebook/DiT-XL-2-256 --bits w4a8 --group-size 64 --device cuda --output build/xl

      qdit-export DiT-XL-2-256x256.pt --bits w4a8 --fid-features inception-2015-12-05.pt
      --reference VIRTUAL_imagenet256.npz --fid-samples 10000

      qdit-export --bits w4a8 --search sensitivity --budget effective-bits=g128 --pareto

      qdit-export --bits w4a8 --activation-group-size token --scale-format integer --target onnxruntime

      qdit-export --bits w8a8 --group-size channel --target tensorrt-int8 --tensorrt-version 8.6

      qdit-export facebook/DiT-XL-2-256 --bits w4a8 --device cuda --target tensorrt --require-engine

      qdit-export --bits w4a8 --dry-run

    A killed export run again with the same arguments goes on where it was.
    Exit codes: 0 passed, 1 failure, 2 bad input, 3 the proof did not hold.
    """  # noqa: E501  # a break in an example would show in --help
    from ..engines.dry_run import dry_run as describe
    from ..engines.export_job import run_export

    options = options_of(context, ExportOptions, config)
    with terminal_of(verbose, quiet) as terminal:
        if dry_run:
            Console().print(describe(options, terminal))
            return 0
        passed = run_export(options, command_line(), terminal)
    return 0 if passed else GATE_FAILED


export_command = console_entry(export)
