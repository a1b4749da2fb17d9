"""Flags of ONNX Runtime's sessions."""

from __future__ import annotations

from typing import Annotated

import typer

Provider = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="ONNX Runtime: execution provider, such as cuda or CPUExecutionProvider. One that is "
        "missing is an error, never a run on the CPU.",
        show_default=False,
    ),
]
CpuKernels = Annotated[
    str,
    typer.Option(
        metavar="auto|qdit|onnxruntime",
        help="ONNX Runtime on a CPU: what multiplies grouped weights and activations, qdit's own "
        "products or its own; auto takes qdit's where the machine has them.",
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
