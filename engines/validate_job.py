"""`qdit-validate`: prove an exported folder again, from fresh noise, and rewrite its report."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch

from ..calibrate.checkpoint import QuantizedCheckpoint
from ..calibrate.sources import load_model
from ..errors import ArtifactError, InputError
from ..export.lower import DTYPE_KEY
from ..onnx_places import QDQ_FILE
from ..progress import Progress
from .devices import default_batch_size, resolve_device
from .full_precision import FullPrecision
from .options import ValidateOptions
from .proof_engine import OnnxRuntimeProof, OnnxRuntimeTargetProof, ProofEngine, TorchProof
from .proof_job import ProofJob, prove_and_report
from .report.search_schema import SEARCH_NAME, read_search
from .report.targets_schema import TARGETS_NAME, read_targets
from .session_settings import CUDA, parse_provider_options, parse_session_options, providers_of
from .targets.onnxruntime_files import ON_CUDA, OnnxRuntimeFile, file_for
from .targets.onnxruntime_target import as_computed
from .workspace import Workspace

# Those of the targets' files, which may compute another plan than the checkpoint's.
_TARGET_ENGINES = ("onnxruntime-target", "onnxruntime-cuda")


def run_validate(
    folder: Path, options: ValidateOptions, model: str | None, command: str, progress: Progress
) -> bool:
    """Prove `folder`; True when the gate passed. `model` overrides where full precision lies."""
    options.check_engine()
    checkpoint = QuantizedCheckpoint.read(folder)
    device = resolve_device(options.device)
    engine = _engine(folder, checkpoint, options, device, progress)
    if isinstance(engine, OnnxRuntimeProof) and engine.products.note:
        progress.say(f"{options.engine}: {engine.products.note}")
    if options.engine in _TARGET_ENGINES:
        checkpoint = as_computed(checkpoint, _target_file(options))
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    search = read_search(folder / SEARCH_NAME)  # a damaged one is refused before the long work
    targets = read_targets(folder / TARGETS_NAME)
    source = checkpoint.source
    full = FullPrecision(
        partial(load_model, model or source.location, device=device, seed=source.seed or 0)
    )
    given = full.model.source
    if given.sha256 != source.sha256:
        raise InputError(
            f"{given.location} is not the model that {folder} was made from "
            f"(SHA-256 {given.sha256[:12]}, recorded {source.sha256[:12]}); "
            "name the right one with --model"
        )
    job = ProofJob(
        full,
        checkpoint,
        engine,
        options,
        Workspace(folder),
        options.batch_size or default_batch_size(device),
        progress,
        search=search,
        targets=targets,
    )
    return prove_and_report(job, command)


def _engine(
    folder: Path,
    checkpoint: QuantizedCheckpoint,
    options: ValidateOptions,
    device: str,
    progress: Progress,
) -> ProofEngine:
    if options.engine.startswith("tensorrt"):
        from .tensorrt.proof import TensorRtProof, target_file

        path = target_file(folder, options.engine)
        return TensorRtProof(path, progress=progress, threads=options.threads)
    session: dict[str, Any] = {
        "threads": options.threads,
        "provider": options.provider or (CUDA if options.engine == "onnxruntime-cuda" else None),
        "session_options": parse_session_options(options.session_option),
        "provider_options": parse_provider_options(options.provider_option),
        "kernels": options.cpu_kernels,
    }
    if options.engine in _TARGET_ENGINES:
        file = _target_file(options)
        name = "onnxruntime-cuda" if file is ON_CUDA else "onnxruntime-target"
        return OnnxRuntimeTargetProof(file.existing(folder), file.dtype, name=name, **session)
    if options.engine == "torch":
        if not device.startswith("cuda"):
            raise InputError(
                f"--engine torch runs CUDA kernels, got --device {device}; use a GPU, or leave "
                "--engine out"
            )
        return TorchProof(checkpoint, device)
    exported = folder / QDQ_FILE
    if not exported.is_file():
        raise InputError(f"{folder} holds no {QDQ_FILE}; export it again with qdit-export")
    return OnnxRuntimeProof(
        exported,
        _compute_dtype(exported),
        fold_weights=not checkpoint.is_large,
        **session,
    )


def _target_file(options: ValidateOptions) -> OnnxRuntimeFile:
    """The engine's file: CUDA's where it is named, else that of the provider that it runs by, which
    is the CPU's unless another one is named. The CPU provider runs CUDA's file too, slowly."""
    if options.engine == "onnxruntime-cuda":
        return ON_CUDA
    return file_for(providers_of(options.provider)[0])


def _compute_dtype(exported: Path) -> str:
    try:
        model = onnx.load(exported, load_external_data=False)
    except Exception as error:  # protobuf raises its own kinds for damaged bytes
        raise ArtifactError(f"{exported} is not a readable ONNX file: {error}") from error
    for entry in model.metadata_props:
        if entry.key == DTYPE_KEY:
            return str(entry.value)
    raise ArtifactError(f"{exported} does not say what it computes in ({DTYPE_KEY}); export again")
