"""The command `qdit-serve`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from . import common_flags, session_flags
from .entry import console_entry
from .values import terminal_of, values_of


def serve(
    context: typer.Context,
    folder: common_flags.Folder,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    engine: Annotated[
        str,
        typer.Option(
            help="auto (the best that opens), tensorrt-plugin, torch, onnxruntime-cuda, "
            "onnxruntime, qdq, tensorrt-int8 or tensorrt-int4."
        ),
    ] = "auto",
    device: common_flags.Device = "auto",
    threads: common_flags.Threads = None,
    cpu_kernels: session_flags.CpuKernels = "auto",
    full_precision: Annotated[
        bool,
        typer.Option("--full-precision", help="Serve the original model too, for comparison."),
    ] = False,
    vae: Annotated[
        Path | None,
        typer.Option(
            help="AutoencoderKL folder of a latent-space model. Default: vae/ in the folder, or "
            "beside the original model.",
            show_default=False,
        ),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(
            help="Rows of one engine call (a guided image takes two). Default: measured at start.",
            show_default=False,
        ),
    ] = None,
    max_queue: Annotated[
        int, typer.Option(help="Images at hand, running or waiting; more are refused with 429.")
    ] = 256,
    max_images: Annotated[int, typer.Option(help="Images of one request (n).")] = 10,
    max_steps: Annotated[int, typer.Option(help="Steps of one request.")] = 250,
    default_steps: Annotated[int, typer.Option(help="Steps where a request says nothing.")] = 20,
    default_guidance: Annotated[
        float, typer.Option(help="Guidance scale where a request says nothing; 1.0 is none.")
    ] = 1.5,
    request_timeout: Annotated[
        float,
        typer.Option(help="Seconds for one request; what would take longer is refused with 429."),
    ] = 300.0,
    drain_seconds: Annotated[
        float, typer.Option(help="Seconds for running requests after SIGTERM.")
    ] = 30.0,
    max_connections: Annotated[int, typer.Option(help="Connections at once; more get 503.")] = 1024,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keys that may use the API, one a line; QDIT_API_KEYS works too. Default: anyone.",
            show_default=False,
        ),
    ] = None,
    batching: Annotated[
        str,
        typer.Option(help="step-mixed; whole-trajectory and single are there to compare with."),
    ] = "step-mixed",
    ray: Annotated[
        bool, typer.Option("--ray", help="Put the engines into replicas on a Ray cluster.")
    ] = False,
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="With --ray: local starts a cluster here, auto or HOST:PORT joins one. "
            "Default: local.",
            show_default=False,
        ),
    ] = None,
    replicas: Annotated[
        str | None,
        typer.Option(
            metavar="N|LEAST:MOST",
            help="With --ray: how many; a range follows the load. Default: 1.",
            show_default=False,
        ),
    ] = None,
    replica_cpus: Annotated[
        float | None,
        typer.Option(help="With --ray: CPUs of a replica. Default: 1.", show_default=False),
    ] = None,
    replica_gpus: Annotated[
        float | None,
        typer.Option(
            help="With --ray: GPUs of a replica. Default: 1 where there are GPUs.",
            show_default=False,
        ),
    ] = None,
    emit_triton_repository: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Serve nothing: put the model into a Triton Inference Server repository. Reads "
            "--engine, --device, --threads, --max-batch and --max-queue.",
            show_default=False,
        ),
    ] = None,
    config: common_flags.Config = None,
    verbose: common_flags.Verbose = False,
    quiet: common_flags.Quiet = False,
    version: common_flags.Version = False,
) -> int:
    """Serve an exported folder: OpenAI's images API, a page, metrics and health.

    Examples:

      qdit-serve build/demo-w4a8

      qdit-serve build/demo-w4a8 --full-precision --port 8080

      qdit-serve build/xl --engine torch --device cuda --vae path/to/vae --api-keys keys.txt

      qdit-serve build/xl --ray --ray-address auto --replicas 2:8

      qdit-serve build/demo-w4a8 --emit-triton-repository models --max-batch 32

      curl http://127.0.0.1:8000/v1/images/generations -H 'content-type: application/json'
      -d '{"prompt": "cat", "seed": 1, "num_inference_steps": 20}'

    Requests at different steps share engine calls (step-mixed batching, docs/serve.md).
    SIGTERM drains.
    """
    from ..serve.command import run_serve
    from ..serve.settings import SETTING_NAMES, make_settings
    from ..serve.triton.command import emit_repository

    values = values_of(context, SETTING_NAMES, config) | {"folder": folder}
    with terminal_of(verbose, quiet) as terminal:
        if emit_triton_repository is not None:
            emit_repository(emit_triton_repository, values, terminal)
            return 0
        run_serve(make_settings(**values), terminal, logging.ERROR if quiet else logging.INFO)
    return 0


serve_command = console_entry(serve)
