"""The `trtexec` and `polygraphy` command lines that build the same engine.

On 8.6 layers are told precisions (`surroundings.py`), by names that a build finds and the engine's
manifest keeps. What of that a line lacks is said in its note:

1. No engine was built, or its manifest names no layers: TensorRT chooses for all of them.
2. A name that a tool cannot read is left out. `trtexec` 8.6 splits its lists at commas, removes
   single quotes and takes '*' for all layers (colons it can: the last one ends a name);
   Polygraphy's parser takes a name that begins with '-' for a flag, and no empty one.
3. Polygraphy has no flag for the layers' output types. Without one 8.6 selects a type by the
   layer's precision (NvInfer.h, `setOutputType`), but may choose another where that is faster.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...export.tensorrt.versions import Features
from .settings import FREE_SURROUNDINGS, BuildSettings
from .surroundings import HALF, SINGLE, Told

_ALWAYS_STRONGLY_TYPED = 11  # and without tactic sources of other libraries

# 8.6's own two, which Polygraphy switches off where they are not named, and build.py's
_PREVIEW_FEATURES = (
    "faster_dynamic_shapes_0805",
    "disable_external_tactic_sources_for_core_0805",
    "profile_sharing_0806",
)

_POLYGRAPHY_NAMES = {HALF: "float16", SINGLE: "float32"}
_MOST_NAMES = 3  # of those left out, in a note


@dataclass(frozen=True)
class Command:
    """A line, and in what its engine would be another than qdit's, in words ('' for nothing)."""

    line: str
    note: str


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
    told: Told,
) -> Command:
    """One line for the `trtexec` of this TensorRT. told: by the manifest of the built engine."""
    flags = [f"--onnx={onnx_path}", f"--saveEngine={engine}"]
    read = told.only(_trtexec_reads)
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
        if read.precisions:
            flags.append(f"--layerPrecisions={_listed(read.precisions)}")
        if read.output_types:
            flags.append(f"--layerOutputTypes={_listed(read.output_types)}")
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
    notes = [_unknown(settings, features, told, quantized=quantized), _left_out(told, read)]
    return Command(" ".join(["trtexec", *map(shlex.quote, flags)]), _joined_notes(notes))


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
    told: Told,
) -> Command:
    """One line for `polygraphy convert`. told: by the manifest of the built engine.

    With compatibility flags Polygraphy sets a parser flag that TensorRT 8.6.0 does not have, and
    stops; 8.6.1 has it.
    """
    read = told.only(_polygraphy_reads)
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
        if read.precisions:
            precisions = read.precisions.items()
            names = [f"{name}:{_POLYGRAPHY_NAMES[kind]}" for name, kind in precisions]
            parts += ["--layer-precisions", *names]
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
    notes = [_unknown(settings, features, told, quantized=quantized), _left_out(told, read)]
    if read.output_types:
        notes.append(
            f"the output types of {len(read.output_types)} layers, which qdit's build and trtexec "
            "are told, follow from their precisions here: Polygraphy has no flag for them"
        )
    return Command(" ".join(map(shlex.quote, parts)), _joined_notes(notes))


def _unknown(settings: BuildSettings, features: Features, told: Told, *, quantized: bool) -> str:
    """Case 1. With 'free' and Q/DQ nodes nothing is told, and nothing is missing."""
    free = quantized and settings.surroundings == FREE_SURROUNDINGS
    if features.strongly_typed or told.precisions or free:
        return ""
    what = "attention and the timestep stay" if quantized else "the timestep stays"
    return (
        f"on TensorRT 8.6 {what} TensorRT's own choice in this line, "
        "for only the manifest of a built engine names their layers"
    )


def _left_out(told: Told, read: Told) -> str:
    """Case 2."""
    names = sorted(told.precisions.keys() - read.precisions.keys())
    if not names:
        return ""
    shown = ", ".join(map(repr, names[:_MOST_NAMES]))
    more = ", …" if len(names) > _MOST_NAMES else ""
    return (
        f"{len(names)} layers stay TensorRT's own choice in this line, "
        f"which cannot hold their names: {shown}{more}"
    )


def _trtexec_reads(name: str) -> bool:
    return name != "*" and not set(name) & set(",'")


def _polygraphy_reads(name: str) -> bool:
    return name != "" and not name.startswith("-")


def _listed(types: Mapping[str, str]) -> str:
    return ",".join(f"{name}:{kind}" for name, kind in types.items())


def _joined_notes(notes: Sequence[str]) -> str:
    return "; ".join(note for note in notes if note)


def _joined(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
