"""The `qdit-*` commands: parse, call, show progress. No logic lives here."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from . import __version__
from .engines.options import (
    ExportOptions,
    SchemeOptions,
    ValidateOptions,
    build_options,
    read_config,
)
from .errors import InputError, QditError
from .progress import Terminal

GATE_FAILED = 3  # the exit code of an export whose proof did not hold

_MODEL_HELP = (
    "What to export: nothing for the embedded demo; a diffusers folder or Hub id "
    "(facebook/DiT-XL-2-256); an original DiT .pt file; random:DiT-XL/2 for benchmarks."
)

Model = Annotated[str | None, typer.Argument(help=_MODEL_HELP, show_default=False)]
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
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
BatchSize = Annotated[
    int | None, typer.Option(help="Samples in one call. Default: by device.", show_default=False)
]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads. Default: all cores.", show_default=False)
]
Seed = Annotated[int, typer.Option(help="Seed of noise, labels and calibration.")]
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
TargetList = Annotated[
    str,
    typer.Option(
        metavar="LIST",
        help="Files for other runtimes beside model.onnx, separated by commas: onnxruntime "
        "(int8 on CPUs), onnxruntime-cuda (integer weights, float16), tensorrt-plugin (exact), "
        "tensorrt-int8 (static scales), tensorrt-int4 (weights only), or tensorrt for the one "
        "nearest to the plan. Engines are built where TensorRT and a GPU are.",
        show_default=False,
    ),
]
OnUnsupported = Annotated[
    str,
    typer.Option(
        help="Where a target cannot run the plan: stop, or degrade to the nearest plan, and say so."
    ),
]
TensorRtVersion = Annotated[
    str | None,
    typer.Option(
        metavar="VERSION",
        help="TensorRT that the files are for (8.6, 10, 10.9, 11). Default: the installed one; "
        "without one, the newest.",
        show_default=False,
    ),
]
StaticScales = Annotated[
    str, typer.Option(help="tensorrt-int8: activation scales by least error (mse) or range (max).")
]
Smooth = Annotated[
    float | None,
    typer.Option(
        metavar="ALPHA",
        help="SmoothQuant, 0 … 1, folded into adaLN before quantizing; 0.7 was best on the demo.",
        show_default=False,
    ),
]
BatchProfileOption = Annotated[
    str, typer.Option(metavar="MIN/BEST/MAX", help="Batch sizes that an engine takes.")
]
OptimizationLevel = Annotated[
    int | None,
    typer.Option(help="TensorRT builder, 0 … 5. Default: TensorRT's own.", show_default=False),
]
WorkspaceMib = Annotated[
    int | None,
    typer.Option(help="Most scratch memory of a layer, in MiB. Default: all.", show_default=False),
]
HardwareCompatible = Annotated[
    bool, typer.Option("--hardware-compatible", help="Engine for every GPU from Ampere on.")
]
VersionCompatible = Annotated[
    bool, typer.Option("--version-compatible", help="Engine for later TensorRTs of this major.")
]
WeightStreaming = Annotated[
    bool, typer.Option("--weight-streaming", help="Weights may stay on the host (TensorRT 10).")
]
Refit = Annotated[bool, typer.Option("--refit", help="Weights of the engine may be replaced.")]
AllowFallback = Annotated[
    bool,
    typer.Option(
        "--allow-fallback", help="Keep an engine whose quantized linears run in FP16 or FP32."
    ),
]
RequireEngine = Annotated[
    bool,
    typer.Option("--require-engine", help="Stop with exit code 2 where no engine can be built."),
]
Provider = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="ONNX Runtime: execution provider, such as cuda or CPUExecutionProvider. One that is "
        "missing is an error, never a run on the CPU.",
        show_default=False,
    ),
]
SessionOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE",
        help="ONNX Runtime: an entry of its session configuration; may be given several times.",
        show_default=False,
    ),
]
ProviderOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE",
        help="ONNX Runtime: an option of the execution provider, such as enable_cuda_graph=1; may "
        "be given several times.",
        show_default=False,
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say only errors.")]
Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help=".toml or .json with any of these options; flags win over it."
    ),
]

_EXPORT_EXAMPLES = """Quantize a Diffusion Transformer, export it to ONNX, prove that quality holds.

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
"""


def _settings(context: typer.Context, names: type[Any], config: Path | None) -> dict[str, Any]:
    """Options of the model `names`, as `_given`."""
    return _given(context, names.model_fields, config)


def _given(context: typer.Context, names: Iterable[str], config: Path | None) -> dict[str, Any]:
    """Options called `names`: the config file's, overridden by the flags that were really given."""
    values = read_config(config) if config else {}
    for name in names:
        if name not in context.params:
            continue
        source = context.get_parameter_source(name)
        # compared by name: newer typer versions bring an enumeration of their own
        given = source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")
        if given:
            values[name] = _parsed(name, context.params[name])
    return values


def _parsed(name: str, value: Any) -> Any:
    """Numbers where a flag takes a number or a word ('channel', 'token', 'auto')."""
    if name == "fid_samples" and value == "auto":
        return None
    if isinstance(value, str) and value.isdigit():
        return int(value)
    return value


def _version(value: bool) -> None:
    if value:
        typer.echo(f"qdit {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
]


def _export(
    context: typer.Context,
    model: Model = None,
    bits: Bits = "w4a8",
    group_size: GroupSize = "128",
    activation_group_size: ActivationGroupSize = None,
    symmetric: Symmetric = True,
    weight_symmetric: WeightSymmetric = None,
    activation_symmetric: ActivationSymmetric = None,
    scale_dtype: ScaleDtype = "float16",
    scale_format: ScaleFormat = "float",
    plan: Plan = None,
    search: Search = None,
    budget: Budget = "effective-bits=g128",
    pareto: Pareto = False,
    search_images: SearchImages = None,
    search_refine: SearchRefine = None,
    refine_by: RefineBy = "psnr",
    search_population: SearchPopulation = 50,
    search_generations: SearchGenerations = 10,
    search_workers: SearchWorkers = None,
    ray_address: RayAddress = None,
    latency_target: LatencyTarget = "qdq",
    weights: Annotated[
        str, typer.Option(help="How weights are rounded: gptq, mse or nearest.")
    ] = "gptq",
    calib_samples: Annotated[int, typer.Option(help="Calibration samples for GPTQ.")] = 256,
    num_inference_steps: Steps = 20,
    guidance_scale: Guidance = 1.5,
    scheduler: Scheduler = None,
    fid_samples: FidSamples = "auto",
    fid_features: FidFeatures = None,
    reference: Reference = None,
    max_fid_increase: MaxFidIncrease = None,
    dtype: Annotated[str, typer.Option(help="Compute type of model.onnx.")] = "float32",
    opset: Annotated[int, typer.Option(help="ONNX opset of model.onnx, 21 … 24.")] = 21,
    target: TargetList = "",
    on_unsupported: OnUnsupported = "stop",
    tensorrt_version: TensorRtVersion = None,
    static_scales: StaticScales = "mse",
    smooth: Smooth = None,
    batch_profile: BatchProfileOption = "1/8/32",
    optimization_level: OptimizationLevel = None,
    workspace_mib: WorkspaceMib = None,
    hardware_compatible: HardwareCompatible = False,
    version_compatible: VersionCompatible = False,
    weight_streaming: WeightStreaming = False,
    refit: Refit = False,
    allow_fallback: AllowFallback = False,
    require_engine: RequireEngine = False,
    device: Device = "auto",
    batch_size: BatchSize = None,
    threads: Threads = None,
    seed: Seed = 0,
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
    config: Config = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    version: Version = False,
) -> int:
    from .engines.dry_run import dry_run as describe
    from .engines.export_job import run_export

    options = build_options(ExportOptions, _settings(context, ExportOptions, config))
    with _terminal(verbose, quiet) as terminal:
        if dry_run:
            Console().print(describe(options, terminal))
            return 0
        passed = run_export(options, command_line(), terminal)
    return 0 if passed else GATE_FAILED


def _validate(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="A folder that qdit-export wrote.")],
    engine: Annotated[
        str,
        typer.Option(
            help="What is proven: onnxruntime (model.onnx on the CPU), onnxruntime-target "
            "(onnxruntime/model.onnx on the CPU), onnxruntime-cuda (onnxruntime-cuda/model.onnx by "
            "the CUDA provider, or the one named), torch (the CUDA kernels), "
            "tensorrt-plugin, tensorrt-int8, tensorrt-int4, or tensorrt for the one there."
        ),
    ] = "onnxruntime",
    num_inference_steps: Steps = 20,
    guidance_scale: Guidance = 1.5,
    scheduler: Scheduler = None,
    fid_samples: FidSamples = "auto",
    fid_features: FidFeatures = None,
    reference: Reference = None,
    max_fid_increase: MaxFidIncrease = None,
    device: Device = "auto",
    batch_size: BatchSize = None,
    threads: Threads = None,
    provider: Provider = None,
    session_option: SessionOption = None,
    provider_option: ProviderOption = None,
    seed: Seed = 0,
    model: Annotated[
        str | None,
        typer.Option(help="Full-precision model, where the recorded place has moved."),
    ] = None,
    config: Config = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    version: Version = False,
) -> int:
    """Prove an exported folder again: parity and FID from fresh noise, report rewritten.

    Example:

      qdit-validate build/demo-w4a8 --fid-samples 256 --seed 1

      qdit-validate build/demo-w4a8 --engine torch --device cuda --fid-samples 10000

      qdit-validate build/demo-w8a8 --engine tensorrt --device cuda
    """
    from .engines import validate_job

    options = build_options(ValidateOptions, _settings(context, ValidateOptions, config))
    with _terminal(verbose, quiet) as terminal:
        passed = validate_job.run_validate(folder, options, model, command_line(), terminal)
    return 0 if passed else GATE_FAILED


def _inspect(
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
    version: Version = False,
) -> int:
    """Show each linear's shape, bits, groups and bytes, totals, what each target can run, and the
    precision that a TensorRT engine's linears really run in.

    Examples:

      qdit-inspect build/demo-w4a8

      qdit-inspect build/demo-w8a8/tensorrt/tensorrt-int8.onnx --tensorrt 8.6

      qdit-inspect build/demo-w8a8/tensorrt/tensorrt-int8.engine
    """
    from .engines import inspection

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


def _bench(
    context: typer.Context,
    source: Annotated[
        str, typer.Argument(help="An exported folder, or a model such as random:DiT-XL/2.")
    ],
    bits: Bits = "w4a8",
    group_size: GroupSize = "128",
    activation_group_size: ActivationGroupSize = None,
    symmetric: Symmetric = True,
    weight_symmetric: WeightSymmetric = None,
    activation_symmetric: ActivationSymmetric = None,
    scale_dtype: ScaleDtype = "float16",
    scale_format: ScaleFormat = "float",
    plan: Plan = None,
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
    threads: Threads = None,
    device: Device = "auto",
    provider: Provider = None,
    session_option: SessionOption = None,
    provider_option: ProviderOption = None,
    seed: Seed = 0,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Then say where the time goes, by kind of operator."),
    ] = False,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the results; a plot goes beside it."),
    ] = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    version: Version = False,
) -> int:
    """Time targets side by side in one run: latency, images a second, peak memory, file sizes.

    Examples:

      qdit-bench build/demo-w4a8 --batch 1,8

      qdit-bench random:DiT-XL/2 --bits w4a8 --blocks 4 --targets fp32,qdq,torch --json xl.json

      qdit-bench build/demo-w4a8 --targets fp32,onnxruntime,ort-dynamic --profile --json demo.json
    """
    from .engines import bench_job

    scheme = build_options(SchemeOptions, _settings(context, SchemeOptions, None))
    with _terminal(verbose, quiet) as terminal:
        bench_job.run_bench(
            source,
            scheme,
            batches=_numbers(batch),
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
            json_file=json_file,
            command=command_line(),
            progress=terminal,
        )
    return 0


def _tune(
    context: typer.Context,
    source: Annotated[
        str | None,
        typer.Argument(
            help="An exported folder, or a model such as random:DiT-XL/2. Nothing: the demo.",
            show_default=False,
        ),
    ] = None,
    bits: Bits = "w4a8",
    group_size: GroupSize = "128",
    activation_group_size: ActivationGroupSize = None,
    symmetric: Symmetric = True,
    weight_symmetric: WeightSymmetric = None,
    activation_symmetric: ActivationSymmetric = None,
    scale_dtype: ScaleDtype = "float16",
    scale_format: ScaleFormat = "float",
    plan: Plan = None,
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
    verbose: Verbose = False,
    quiet: Quiet = False,
    version: Version = False,
) -> int:
    """Time the CUDA kernels' tiles for a model on this GPU and keep the fastest.

    The kernels run without this, on tiles that were measured on an H100 or that a rule chooses.
    Results are the same to the bit whatever the tile.

    Examples:

      qdit-tune build/DiT-XL-2-256-w4a8 --batch 16,64

      qdit-tune random:DiT-XL/2 --bits w8a8 --activation-group-size token
    """
    from .engines import tune_job

    scheme = build_options(SchemeOptions, _settings(context, SchemeOptions, None))
    with _terminal(verbose, quiet) as terminal:
        tune_job.run_tune(
            source,
            scheme,
            batches=_numbers(batch),
            device=device,
            output=output,
            progress=terminal,
        )
    return 0


_SERVE_EXAMPLES = """Serve an exported folder: OpenAI's images API, a page, metrics and health.

Examples:

  qdit-serve build/demo-w4a8

  qdit-serve build/demo-w4a8 --full-precision --port 8080

  qdit-serve build/xl --engine torch --device cuda --vae path/to/vae --api-keys keys.txt

  qdit-serve build/xl --ray --ray-address auto --replicas 2:8

  qdit-serve build/demo-w4a8 --emit-triton-repository models --max-batch 32

  curl http://127.0.0.1:8000/v1/images/generations -H 'content-type: application/json'
  -d '{"prompt": "cat", "seed": 1, "num_inference_steps": 20}'

Requests at different steps share engine calls (step-mixed batching, docs/serve.md). SIGTERM drains.
"""


def _serve(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="A folder that qdit-export wrote.")],
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    engine: Annotated[
        str,
        typer.Option(
            help="auto (the best that opens), tensorrt-plugin, torch, onnxruntime-cuda, "
            "onnxruntime, qdq, tensorrt-int8 or tensorrt-int4."
        ),
    ] = "auto",
    device: Device = "auto",
    threads: Threads = None,
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
    config: Config = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    version: Version = False,
) -> int:
    from .serve.command import run_serve
    from .serve.settings import SETTING_NAMES, make_settings
    from .serve.triton.command import emit_repository

    values = _given(context, SETTING_NAMES, config) | {"folder": folder}
    with _terminal(verbose, quiet) as terminal:
        if emit_triton_repository is not None:
            emit_repository(emit_triton_repository, values, terminal)
            return 0
        run_serve(make_settings(**values), terminal, logging.ERROR if quiet else logging.INFO)
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"batch must be numbers such as 1,8, got {text!r}") from error
    if min(numbers) < 1:
        raise InputError(f"every batch size must be at least 1, got {text!r}")
    return numbers


def _terminal(verbose: bool, quiet: bool) -> Terminal:
    return Terminal(0 if quiet else 2 if verbose else 1)


def command_line() -> str:
    """The command as it was typed, for reports."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _command(function: Callable[..., int], help_text: str | None = None) -> Callable[[], None]:
    """A console entry: runs `function`, maps the project's errors to one line and an exit code."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(help=help_text)(function)

    def entry() -> None:
        try:
            code = app(standalone_mode=False)
        except QditError as error:
            _fail(str(error))
            sys.exit(error.exit_code)
        except typer.Abort:
            sys.exit(130)
        except KeyboardInterrupt:
            _fail("interrupted; run the same command again to go on")
            sys.exit(130)
        except Exception as error:
            if not hasattr(error, "exit_code") or not hasattr(error, "format_message"):
                raise
            _fail(error.format_message())  # click's own usage errors
            sys.exit(2)
        sys.exit(code or 0)

    return entry


def _fail(message: str) -> None:
    Console(stderr=True, highlight=False).print(f"error: {message}", markup=False, soft_wrap=True)


export_command = _command(_export, _EXPORT_EXAMPLES)
validate_command = _command(_validate)
inspect_command = _command(_inspect)
bench_command = _command(_bench)
serve_command = _command(_serve, _SERVE_EXAMPLES)
tune_command = _command(_tune)
