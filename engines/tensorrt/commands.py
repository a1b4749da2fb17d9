"""The `trtexec` and `polygraphy` command lines that build the same engine.

But for one thing: on 8.6 they tell no layer its precision (`surroundings.py`), which would take
dozens of names on the line. Their INT8 engines are those of `surroundings` 'free'.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...export.tensorrt.versions import Features
from .settings import BuildSettings

_ALWAYS_STRONGLY_TYPED = 11  # and without tactic sources of other libraries

# 8.6's own two, which Polygraphy switches off where they are not named, and build.py's
_PREVIEW_FEATURES = (
    "faster_dynamic_shapes_0805",
    "disable_external_tactic_sources_for_core_0805",
    "profile_sharing_0806",
)


@dataclass(frozen=True)
class InputShape:
    """A network input: its name, and its sizes after the batch."""

    name: str
    sizes: tuple[int, ...]

    def at(self, batch: int) -> tuple[int, ...]:
        return (batch, *self.sizes)


def trtexec_command(
    onnx_path: Path,
    engine: Path,
    inputs: Sequence[InputShape],
    settings: BuildSettings,
    features: Features,
    *,
    quantized: bool,
) -> str:
    """One line for the `trtexec` of this TensorRT."""
    flags = [f"--onnx={onnx_path}", f"--saveEngine={engine}"]
    batches = settings.batch
    for name, batch in (
        ("min", batches.least),
        ("opt", batches.best),
        ("max", batches.most),
    ):
        shapes = ",".join(f"{given.name}:{_joined(given.at(batch))}" for given in inputs)
        flags.append(f"--{name}Shapes={shapes}")
    if not features.strongly_typed:
        flags += ["--fp16", *(["--int8"] if quantized else [])]
        flags.append("--precisionConstraints=prefer")
        flags.append("--preview=+profileSharing0806")  # see build.py
    elif features.version.major < _ALWAYS_STRONGLY_TYPED:
        flags.append("--stronglyTyped")
    if features.version.major < _ALWAYS_STRONGLY_TYPED:
        flags.append("--tacticSources=-CUBLAS,-CUBLAS_LT,-CUDNN")
    flags.append("--noTF32")
    flags += _common(settings)
    if settings.workspace_bytes is not None:
        flags.append(f"--memPoolSize=workspace:{settings.workspace_bytes / 2**20:g}")
    flags.append(f"--timingCacheFile={engine.with_name('timing.cache')}")
    flags.append("--profilingVerbosity=detailed")
    return " ".join(["trtexec", *map(shlex.quote, flags)])


def _common(settings: BuildSettings) -> list[str]:
    flags = []
    if settings.optimization_level is not None:
        flags.append(f"--builderOptimizationLevel={settings.optimization_level}")
    if settings.hardware_compatible:
        flags.append("--hardwareCompatibilityLevel=ampere+")
    if settings.version_compatible:
        flags.append("--versionCompatible")
    if settings.weight_streaming:
        flags.append("--allowWeightStreaming")
    if settings.refit:
        flags.append("--refit")
    return flags


def polygraphy_command(
    onnx_path: Path,
    engine: Path,
    inputs: Sequence[InputShape],
    settings: BuildSettings,
    features: Features,
    *,
    quantized: bool,
) -> str:
    """One line for `polygraphy convert`.

    With compatibility flags Polygraphy sets a parser flag that TensorRT 8.6.0 does not have, and
    stops; 8.6.1 has it.
    """
    parts = ["polygraphy", "convert", str(onnx_path), "--convert-to", "trt", "-o", str(engine)]
    batches = settings.batch
    for flag, batch in (
        ("--trt-min-shapes", batches.least),
        ("--trt-opt-shapes", batches.best),
        ("--trt-max-shapes", batches.most),
    ):
        shapes = [f"{given.name}:[{','.join(map(str, given.at(batch)))}]" for given in inputs]
        parts += [flag, *shapes]
    if features.strongly_typed:
        parts.append("--strongly-typed")
    else:
        parts += ["--fp16", *(["--int8"] if quantized else []), "--precision-constraints", "prefer"]
        parts += ["--preview-features", *_PREVIEW_FEATURES]
    if features.version.major < _ALWAYS_STRONGLY_TYPED:
        parts += ["--tactic-sources", "edge_mask_convolutions", "jit_convolutions"]
    parts += ["--profiling-verbosity", "detailed"]
    if settings.optimization_level is not None:
        parts += ["--builder-optimization-level", str(settings.optimization_level)]
    if settings.hardware_compatible:
        parts += ["--hardware-compatibility-level", "ampere_plus"]
    if settings.version_compatible:
        parts.append("--version-compatible")
    if settings.weight_streaming:
        parts.append("--weight-streaming")
    if settings.refit:
        parts.append("--refittable")
    if settings.workspace_bytes is not None:
        parts += ["--pool-limit", f"workspace:{settings.workspace_bytes}"]
    cache = str(engine.with_name("timing.cache"))
    parts += ["--load-timing-cache", cache, "--save-timing-cache", cache]
    return " ".join(map(shlex.quote, parts))


def _joined(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
