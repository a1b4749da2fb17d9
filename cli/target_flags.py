"""Flags of `TargetOptions`: which runtimes get a file, and how engines are built."""

from __future__ import annotations

from typing import Annotated

import typer

Targets = Annotated[
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
BatchProfile = Annotated[
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
