"""From figures to a `Report`: pure assembly, no measuring."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ...calibrate.checkpoint import QuantizedCheckpoint
from ...calibrate.fid import FidDifference
from ...calibrate.model import DiffusionModel
from ...calibrate.plan import LinearSpec
from ...calibrate.sampling import SamplingSettings
from ...files import sha256_of_file
from ..gate import Gate, Limits, linear_bound
from ..parity import DenoiserParity
from ..parity_images import ImageParity
from ..parity_measure import Comparison, Worst
from ..parity_timesteps import BOUND_FACTOR, DenoiserBound
from .integer_scales import integer_scales_entry
from .schema import (
    BlockEntry,
    BoundEntry,
    CheckEntry,
    ComparisonEntry,
    EngineComparisonEntry,
    FidEntry,
    FileEntry,
    ImagesEntry,
    LayerEntry,
    LinearEntry,
    ModelEntry,
    ParityEntry,
    PlanEntry,
    Report,
    SamplingEntry,
    SizeParts,
    SizesEntry,
    SourceEntry,
    TimestepEntry,
    WorstEntry,
)
from .search_schema import SearchEntry
from .targets_schema import TargetEntry


@dataclass(frozen=True)
class Proof:
    """The figures of one proof and the gate's verdict on them.

    engine: the one that was proven, a key of `ENGINE_TITLES`;
    images_engine: what made the quantized images, that engine or 'simulation';
    features / reference: the files that FID was measured with, for the record.
    """

    parity: DenoiserParity
    images: ImageParity | None
    fid: FidDifference | None
    limits: Limits
    gate: Gate
    engine: str = "onnxruntime"
    images_engine: str = "onnxruntime"
    features: str = ""
    reference: str = ""


def build_report(
    model: DiffusionModel,
    checkpoint: QuantizedCheckpoint,
    proof: Proof,
    settings: SamplingSettings,
    *,
    command: str,
    timings: Mapping[str, float],
    machine: Mapping[str, Any],
    output: Path,
    files: Sequence[Path] = (),
    warnings: Sequence[str] = (),
    created: datetime | None = None,
    search: SearchEntry | None = None,
    targets: Sequence[TargetEntry] = (),
) -> Report:
    """Assemble the report of one export.

    `model` is the full-precision model; `machine` is `describe_machine()`; `files` lie under
    `output` and are hashed here; `search` is how the plan was found, if by a search; `targets` are
    the files and engines of other runtimes.
    """
    facts = dict(machine)
    versions = facts.pop("versions", {})
    plan = _plan(checkpoint)
    moment = created or datetime.now(timezone.utc)
    return Report(
        created=moment.isoformat(timespec="seconds"),
        command=command,
        model=_model(model),
        plan=plan,
        sizes=_sizes(checkpoint, output, files),
        sampling=SamplingEntry(**asdict(settings)),
        parity=_parity(proof),
        timings_s=dict(timings),
        machine=facts,
        versions=versions,
        warnings=tuple(warnings),
        search=search,
        targets=tuple(targets),
        integer_scales=integer_scales_entry(checkpoint.plan, checkpoint.linears, plan.layers),
    )


def _model(model: DiffusionModel) -> ModelEntry:
    return ModelEntry(
        name=model.name,
        family=model.family.name,
        parameters=model.parameter_count(),
        sample_shape=model.sample_shape,
        classes=model.family.class_count(model.denoiser),
        source=SourceEntry(**asdict(model.source)),
    )


def _plan(checkpoint: QuantizedCheckpoint) -> PlanEntry:
    plan, settings = checkpoint.plan, checkpoint.provenance.settings
    quantized = [spec for spec in checkpoint.linears if plan[spec.name].quantizes_weights]
    return PlanEntry(
        bits=plan.bits,
        effective_weight_bits=plan.effective_weight_bits(quantized or checkpoint.linears),
        weights=str(settings.get("weights", "")),
        layers=tuple(_layer(checkpoint, spec) for spec in checkpoint.linears),
    )


def _layer(checkpoint: QuantizedCheckpoint, spec: LinearSpec) -> LayerEntry:
    scheme = checkpoint.plan[spec.name]
    errors = checkpoint.metrics.get(spec.name)
    known: dict[str, Any] = errors if isinstance(errors, dict) else {}
    others = known.get("float_scales")
    compared: dict[str, Any] = others if isinstance(others, dict) else {}
    return LayerEntry(
        name=spec.name,
        role=spec.role,
        block=spec.block,
        in_features=spec.in_features,
        out_features=spec.out_features,
        **scheme.to_json(),
        scheme=scheme.label,
        bytes=round(scheme.effective_weight_bits(spec.in_features) * spec.weight_count / 8),
        weight_error=known.get("weight"),
        output_error=known.get("output"),
        float_scales_weight_error=compared.get("weight"),
        float_scales_output_error=compared.get("output"),
    )


def _sizes(checkpoint: QuantizedCheckpoint, output: Path, files: Sequence[Path]) -> SizesEntry:
    integers = total = count = 0.0
    for spec in checkpoint.linears:
        scheme = checkpoint.plan[spec.name]
        if scheme.quantizes_weights:
            integers += scheme.weight_bits * spec.weight_count / 8
            total += scheme.effective_weight_bits(spec.in_features) * spec.weight_count / 8
        count += spec.weight_count
    size = checkpoint.byte_size
    return SizesEntry(
        full_precision_fp16_bytes=checkpoint.full_precision_fp16_bytes,
        full_precision_fp16_linears_bytes=int(2 * count),
        quantized_bytes=size,
        parts=SizeParts(
            integers_bytes=round(integers),
            scales_and_zero_points_bytes=round(total - integers),
            untouched_parameters_bytes=max(0, size - round(total)),
        ),
        files=tuple(
            FileEntry(
                name=path.relative_to(output).as_posix(),
                bytes=path.stat().st_size,
                sha256=sha256_of_file(path),
            )
            for path in files
        ),
    )


def _parity(proof: Proof) -> ParityEntry:
    parity, gate = proof.parity, proof.gate
    return ParityEntry(
        passed=gate.passed,
        complete=gate.complete,
        reason=gate.reason,
        checks=tuple(CheckEntry(**asdict(check)) for check in gate.checks),
        dtype=parity.dtype,
        images_compared=parity.images,
        steps_compared=len(parity.timesteps),
        simulation_vs_full_precision=ComparisonEntry(**_comparison(parity.simulation)),
        engine=proof.engine,
        engine_vs_simulation=EngineComparisonEntry(
            **_comparison(parity.engine), bound=_bound(parity.bound)
        ),
        engine_vs_file=(
            None if parity.file is None else ComparisonEntry(**_comparison(parity.file.engine))
        ),
        file_own_relative_error=(
            None if parity.file is None else finite(parity.file.own.relative_error)
        ),
        linears=tuple(
            LinearEntry(
                name=linear.name,
                relative_error=finite(linear.comparison.relative_error),
                bound=linear_bound(linear),
                worst=_worst(linear.comparison.worst),
            )
            for linear in parity.linears
        ),
        blocks=tuple(
            BlockEntry(block=error.block, **_pair(error.simulation, error.engine))
            for error in parity.blocks
        ),
        timesteps=tuple(
            TimestepEntry(timestep=error.timestep, **_pair(error.simulation, error.engine))
            for error in parity.timesteps
        ),
        images=_images(proof),
        fid=_fid(proof),
        fid_not_run=_fid_reason(gate),
    )


def _images(proof: Proof) -> ImagesEntry | None:
    if proof.images is None:
        return None
    return ImagesEntry(engine=proof.images_engine, **asdict(proof.images))


def _fid(proof: Proof) -> FidEntry | None:
    if proof.fid is None:
        return None
    figures = asdict(proof.fid)
    return FidEntry(
        difference_ci95=figures.pop("ci95"),
        max_increase=proof.limits.fid_increase(proof.fid.full_precision),
        features=proof.features,
        reference=proof.reference,
        **figures,
    )


def _fid_reason(gate: Gate) -> str | None:
    for check in gate.checks:
        if check.name == "fid_increase" and check.outcome == "not run":
            return check.why
    return None


def _comparison(comparison: Comparison) -> dict[str, Any]:
    return {
        "relative_error": finite(comparison.relative_error),
        "elements": comparison.elements,
        "worst": _worst(comparison.worst),
    }


def _worst(worst: Worst | None) -> WorstEntry | None:
    if worst is None:
        return None
    return WorstEntry(
        where=worst.where,
        expected=finite(worst.expected),
        got=finite(worst.got),
        needed_tolerance=finite(worst.needed_tolerance),
    )


def _bound(bound: DenoiserBound) -> BoundEntry:
    return BoundEntry(
        ratio=finite(bound.ratio),
        limit=BOUND_FACTOR,
        own_relative_error=finite(bound.own.relative_error),
        own_dtypes=bound.own_dtypes,
        inputs=bound.inputs,
    )


def _pair(simulation: Comparison, engine: Comparison | None) -> dict[str, float | None]:
    return {
        "simulation_vs_full_precision": finite(simulation.relative_error),
        "engine_vs_simulation": None if engine is None else finite(engine.relative_error),
    }


def finite(value: float) -> float | None:
    """The value, or None for NaN and infinity, which JSON cannot hold."""
    return value if math.isfinite(value) else None
