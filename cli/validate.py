"""The command `qdit-validate`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..engines.options import ValidateOptions
from . import common_flags, proof_flags, session_flags
from .entry import GATE_FAILED, command_line, console_entry
from .values import options_of, terminal_of


def validate(
    context: typer.Context,
    folder: common_flags.Folder,
    engine: Annotated[
        str,
        typer.Option(
            help="What is proven: onnxruntime (model.onnx on the CPU), onnxruntime-target "
            "(onnxruntime/model.onnx on the CPU), onnxruntime-cuda (onnxruntime-cuda/model.onnx by "
            "the CUDA provider, or the one named), torch (the CUDA kernels), "
            "tensorrt-plugin, tensorrt-int8, tensorrt-int4, or tensorrt for the one there."
        ),
    ] = "onnxruntime",
    num_inference_steps: proof_flags.Steps = 20,
    guidance_scale: proof_flags.Guidance = 1.5,
    scheduler: proof_flags.Scheduler = None,
    fid_samples: proof_flags.FidSamples = "auto",
    fid_features: proof_flags.FidFeatures = None,
    reference: proof_flags.Reference = None,
    max_fid_increase: proof_flags.MaxFidIncrease = None,
    device: common_flags.Device = "auto",
    batch_size: proof_flags.BatchSize = None,
    threads: common_flags.Threads = None,
    provider: session_flags.Provider = None,
    session_option: session_flags.SessionOption = None,
    provider_option: session_flags.ProviderOption = None,
    cpu_kernels: session_flags.CpuKernels = "auto",
    seed: common_flags.Seed = 0,
    model: Annotated[
        str | None,
        typer.Option(help="Full-precision model, where the recorded place has moved."),
    ] = None,
    config: common_flags.Config = None,
    verbose: common_flags.Verbose = False,
    quiet: common_flags.Quiet = False,
    version: common_flags.Version = False,
) -> int:
    """Prove an exported folder again: parity and FID from fresh noise, report rewritten.

    Example:

      qdit-validate build/demo-w4a8 --fid-samples 256 --seed 1

      qdit-validate build/demo-w4a8 --engine torch --device cuda --fid-samples 10000

      qdit-validate build/demo-w8a8 --engine tensorrt --device cuda
    """
    from ..engines import validate_job

    options = options_of(context, ValidateOptions, config)
    with terminal_of(verbose, quiet) as terminal:
        passed = validate_job.run_validate(folder, options, model, command_line(), terminal)
    return 0 if passed else GATE_FAILED


validate_command = console_entry(validate)
