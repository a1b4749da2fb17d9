"""Build a serialized engine from an ONNX file, with Polygraphy and the TensorRT Python API.

One code path for 8.6, 10 and 11: Polygraphy's `CreateConfig` knows which version has which flag,
and what is left is decided by `Features`.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import StepError
from ...export.tensorrt.versions import Features, TensorRtVersion
from ...progress import Progress
from .library import polygraphy_backend, tensorrt_module
from .log import ErrorLog, make_logger
from .monitor import heartbeat, make_monitor
from .settings import BuildSettings
from .surroundings import HALF, Told, tell_precisions

# cuBLAS and cuDNN are tactics of older versions that need libraries of their own; measured on the
# files here, nothing chose them. From 11 on they are gone.
_EXTERNAL_TACTICS = ("CUBLAS", "CUBLAS_LT", "CUDNN")


# 8.6 gives an optimization profile to one execution context alone unless this is asked for, and
# an engine has a context a batch size. From 10 on profiles are always shared, and asking for it is
# warned about; 11 has no such feature.
_SHARED_PROFILES = "PROFILE_SHARING_0806"


@dataclass(frozen=True)
class Built:
    """A serialized engine, and the timing cache as the build left it (empty: there is none).

    told: what the layers of a weakly typed network were told.
    """

    engine: bytes
    timing_cache: bytes
    told: Told


def build_engine(
    onnx_path: Path,
    settings: BuildSettings,
    features: Features,
    progress: Progress,
    *,
    timing_cache: Path | None = None,
) -> Built:
    """Parse `onnx_path` and build it. Plugins must have been registered before.

    Raises `InputError` without TensorRT, `StepError` with the parser's or the builder's own words
    where the file is not taken.
    """
    settings.check(features)
    trt = tensorrt_module()
    log = ErrorLog()
    logger = make_logger(trt, log)
    builder = trt.Builder(logger)
    network = _parse(trt, builder, logger, log, onnx_path, features)
    told = Told()
    if not features.strongly_typed:
        told = tell_precisions(trt, network, settings.surroundings)
    if told.count(HALF):
        progress.say(f"TensorRT: {told.count(HALF)} layers of attention are to be FP16")
    monitor = make_monitor(trt, progress)
    config = _configure(trt, builder, network, settings, features, monitor, timing_cache)
    progress.say(f"building {onnx_path.stem} with TensorRT {trt.__version__}")
    alive = heartbeat(progress, onnx_path.stem) if monitor is None else nullcontext()
    with alive:
        serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise StepError(f"TensorRT {trt.__version__} could not build {onnx_path}: {log.text()}")
    return Built(bytes(serialized), _cache_of(config), told)


def preview_features(trt: Any, features: Features) -> list[str]:
    """The preview features that a build switches on, by TensorRT's names: part of an engine's key.

    Empty where the version needs none, or where its bindings (`trt`) have none of that name.
    """
    known = getattr(getattr(trt, "PreviewFeature", None), "__members__", {})
    needed = features.version < TensorRtVersion(10) and _SHARED_PROFILES in known
    return [_SHARED_PROFILES] if needed else []


def _parse(
    trt: Any, builder: Any, logger: Any, log: ErrorLog, path: Path, features: Features
) -> Any:
    network = builder.create_network(_network_flags(trt, features))
    trt.init_libnvinfer_plugins(logger, "")
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(str(path)):
        return network
    problems = [parser.get_error(index) for index in range(parser.num_errors)]
    words = "; ".join(f"node {error.node()}: {error.desc()}" for error in problems)
    raise StepError(
        f"TensorRT {trt.__version__} cannot parse {path}: {words or log.text()}; "
        f"check it with qdit-inspect {path} --tensorrt {features.version}"
    )


def _network_flags(trt: Any, features: Features) -> int:
    """Explicit batch is asked for by name in 8.x and the only kind since; types since 10."""
    kinds = trt.NetworkDefinitionCreationFlag
    names = ["STRONGLY_TYPED"] if features.strongly_typed else ["EXPLICIT_BATCH"]
    return sum(1 << int(getattr(kinds, name)) for name in names)


def _configure(
    trt: Any,
    builder: Any,
    network: Any,
    settings: BuildSettings,
    features: Features,
    monitor: Any,
    timing_cache: Path | None,
) -> Any:
    polygraphy = polygraphy_backend()
    profile = polygraphy.Profile()
    for index in range(network.num_inputs):
        given = network.get_input(index)
        sizes = [
            tuple(batch if size < 0 else size for size in given.shape)
            for batch in (settings.batch.least, settings.batch.best, settings.batch.most)
        ]
        profile.add(given.name, *sizes)
    weakly = not features.strongly_typed
    options: dict[str, Any] = {
        "profiles": [profile],
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
        "builder_optimization_level": settings.optimization_level,
        "refittable": settings.refit,
        "version_compatible": settings.version_compatible,
        "weight_streaming": settings.weight_streaming,
    }
    if weakly:
        options |= {"fp16": True, "int8": _is_quantized(trt, network)}
        options["precision_constraints"] = "prefer"
    if settings.workspace_bytes is not None:
        options["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: settings.workspace_bytes}
    if settings.hardware_compatible:
        levels = trt.HardwareCompatibilityLevel
        options["hardware_compatibility_level"] = levels.AMPERE_PLUS
    if timing_cache is not None and timing_cache.is_file():
        options["load_timing_cache"] = str(timing_cache)
    if features.version < TensorRtVersion(11):
        kept = [
            source
            for name, source in trt.TacticSource.__members__.items()
            if name not in _EXTERNAL_TACTICS
        ]
        options["tactic_sources"] = kept
    if monitor is not None:
        options["progress_monitor"] = monitor
    config = polygraphy.CreateConfig(**options)(builder, network)
    for name in preview_features(trt, features):  # Polygraphy would switch the others off
        config.set_preview_feature(trt.PreviewFeature.__members__[name], True)
    if timing_cache is not None:  # Polygraphy's lock, which it leaves behind
        timing_cache.with_name(f"{timing_cache.name}.lock").unlink(missing_ok=True)
    return config


def _is_quantized(trt: Any, network: Any) -> bool:
    kinds = (trt.LayerType.QUANTIZE, trt.LayerType.DEQUANTIZE)
    return any(network.get_layer(index).type in kinds for index in range(network.num_layers))


def _cache_of(config: Any) -> bytes:
    cache = config.get_timing_cache()
    return b"" if cache is None else bytes(cache.serialize())
