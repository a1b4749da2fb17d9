"""Engines on disk: built once, reused while nothing they follow from has changed.

NAME.engine              the serialized engine
NAME.engine.json         its manifest, written last: without it there is no engine
NAME.ledger.json         the precision of every linear
NAME.layers.json         the engine inspector's own answer, to be looked at: nothing reads it
timing.cache             what TensorRT measured, for all engines of the folder
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import ArtifactError, QditError
from ...export.tensorrt.versions import Features
from ...files import atomic_path, sha256_of_file, write_text
from ...progress import Progress
from .build import Built, build_engine, preview_features
from .engine import TensorRtEngine
from .kernels import float_products, integer_products
from .ledger import HIDDEN, Ledger, make_ledger, with_kernels
from .library import gpu_identity, installed_features, tensorrt_module
from .linears import least_float_products, linears_of
from .manifest import EngineManifest, manifest_path
from .settings import BuildSettings

FOLDER = "tensorrt"  # of an exported folder
TIMING_CACHE = "timing.cache"


@dataclass(frozen=True)
class StoredEngine:
    """An engine on disk. `reused`: it was built before; `why`: the reason why it was built now."""

    path: Path
    manifest: EngineManifest
    ledger: Ledger
    reused: bool
    why: str

    def open(self) -> TensorRtEngine:
        """Load it onto the GPU."""
        return TensorRtEngine(self.path)


def engine_path(onnx_path: Path) -> Path:
    """Where the engine of a file lies."""
    return onnx_path.with_suffix(".engine")


def ledger_path(engine: Path) -> Path:
    return engine.with_name(f"{engine.stem}.ledger.json")


def layers_path(engine: Path) -> Path:
    return engine.with_name(f"{engine.stem}.layers.json")


def stored_engine(
    onnx_path: Path,
    settings: BuildSettings,
    features: Features,
    progress: Progress,
    *,
    plugins: Callable[[], str] = str,
) -> StoredEngine:
    """The engine of `onnx_path` under `settings`: the one on disk if it fits, else a new one.

    `plugins()` registers the plugins that the file names and returns their digest ('' for none).
    A build that fails, is killed, or has quantized linears that fell back (without
    `settings.allow_fallback`) leaves no engine, also not the one before it. Raises `StepError`.
    """
    settings.check(features)
    engine = engine_path(onnx_path)
    trt = tensorrt_module()
    wanted = EngineManifest.of(
        onnx_path,
        settings,
        str(trt.__version__),
        gpu_identity(),
        plugins(),
        preview_features(trt, features),
    )
    found = EngineManifest.read(manifest_path(engine))
    why = _why_build(engine, found, wanted)
    if found is not None and not why:
        progress.say(f"reused {engine.name}: nothing that it follows from has changed")
        return StoredEngine(engine, found, Ledger.read(ledger_path(engine)), True, "")
    progress.say(f"{engine.name}: {why}")
    forget_engine(engine)
    started = time.perf_counter()
    cache = engine.with_name(TIMING_CACHE)
    built = build_engine(onnx_path, settings, features, progress, timing_cache=cache)
    seconds = time.perf_counter() - started
    return _install(onnx_path, engine, built, wanted, seconds, settings, progress, why)


def _install(
    onnx_path: Path,
    engine: Path,
    built: Built,
    wanted: EngineManifest,
    seconds: float,
    settings: BuildSettings,
    progress: Progress,
    why: str,
) -> StoredEngine:
    """Write the engine, what its inspector says, its ledger, and the manifest last.

    The inspector's answer and the ledger stay where a fallback removes the engine: they say why.
    """
    if built.timing_cache:
        with atomic_path(engine.with_name(TIMING_CACHE)) as fresh:
            fresh.write_bytes(built.timing_cache)
    with atomic_path(engine) as fresh:
        fresh.write_bytes(built.engine)
    try:
        with TensorRtEngine(engine, host_code=settings.version_compatible) as opened:
            layers = opened.layers()
            ledger = _ledger(onnx_path, opened, layers, progress)
        write_text(layers_path(engine), json.dumps({"Layers": layers}, indent=1) + "\n")
        ledger.write(ledger_path(engine))
        progress.say(f"precision of {engine.name}: {ledger.summary}")
        ledger.check(settings.allow_fallback)
    except Exception:
        engine.unlink(missing_ok=True)
        raise
    manifest = replace(
        wanted,
        engine_sha256=sha256_of_file(engine),
        engine_bytes=len(built.engine),
        build_seconds=round(seconds, 1),
        told=built.told,
    )
    manifest.write(manifest_path(engine))
    megabytes = len(built.engine) / 1e6
    progress.say(f"wrote {engine} ({megabytes:.1f} MB, built in {seconds:.0f} s)")
    return StoredEngine(engine, manifest, ledger, False, why)


def _ledger(
    onnx_path: Path, engine: TensorRtEngine, layers: list[dict[str, Any]], progress: Progress
) -> Ledger:
    """By the inspector's layers, and by the kernels where these show no linear."""
    linears = linears_of(onnx_path)
    ledger = make_ledger(linears, layers)
    if not any(row.executed == HIDDEN for row in ledger.unproved):
        return ledger
    try:
        kernels = engine.kernels()
    except QditError as error:  # unproved it stays, and the engine is no worse for it
        progress.say(f"kernels of {onnx_path.stem} cannot be named: {error}")
        return ledger
    return with_kernels(
        ledger,
        linears,
        integer=integer_products(kernels),
        floats=float_products(kernels),
        least_floats=least_float_products(onnx_path),
    )


def _why_build(engine: Path, found: EngineManifest | None, wanted: EngineManifest) -> str:
    """Why the engine on disk cannot be used; '' when it can."""
    if found is None:
        return "building it: there is none yet"
    if not engine.is_file() or engine.stat().st_size != found.engine_bytes:
        return "building it: the file is missing or cut short"
    changed = found.difference(wanted)
    if changed:
        return f"building it again: {changed}"
    if sha256_of_file(engine) != found.engine_sha256:
        return "building it again: the file is not the one that was built"
    try:
        Ledger.read(ledger_path(engine))
    except ArtifactError:
        return "building it again: its precision ledger is missing or damaged"
    return ""


def forget_engine(engine: Path) -> None:
    """Remove an engine and what describes it, the manifest first."""
    for path in (manifest_path(engine), engine, ledger_path(engine), layers_path(engine)):
        path.unlink(missing_ok=True)


def why_not_here(found: EngineManifest) -> str:
    """What keeps a finished engine from running with the TensorRT that is installed, in words; ''
    for nothing. One of 8.6 without shared profiles would end the process, not the call."""
    trt = tensorrt_module()
    wanted = replace(
        found,
        tensorrt=str(trt.__version__),
        preview_features=preview_features(trt, installed_features()),
    )
    return found.difference(wanted)


def checked_engine(engine: Path) -> EngineManifest:
    """The manifest of a finished engine. Raises `ArtifactError` for a file that is none."""
    found = EngineManifest.read(manifest_path(engine))
    if found is None or not engine.is_file() or engine.stat().st_size != found.engine_bytes:
        raise ArtifactError(
            f"{engine} is no finished engine; build it again with qdit-export --target (its "
            "manifest is missing or of another file)"
        )
    return found
