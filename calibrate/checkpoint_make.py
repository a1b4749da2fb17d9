"""Put a quantized checkpoint together from a model, its plan and its quantized weights."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..files import canonical_json
from ..progress import Progress
from .checkpoint_layout import (
    check_weight,
    encode_part,
    quantized_linears,
    stored_parameter,
    tensor_name,
    weight_entries,
)
from .checkpoint_manifest import (
    FORMAT,
    WEIGHTS_NAME,
    LinearEntry,
    Manifest,
    ModelEntry,
    Provenance,
    SourceEntry,
    WeightsEntry,
    schema_version,
)
from .checkpoint_model import apply_ties, find_ties, outline, stored_shapes, stored_tensors
from .families.base import Family
from .model import DiffusionModel
from .plan import LinearSpec, QuantizationPlan
from .quantizers import QuantizedWeight
from .schemes import LayerScheme
from .tensor_file import Sink, TensorEntry, Written, write_tensors

# What could change a bit of the result; their versions are part of the provenance.
_LIBRARIES = ("torch", "diffusers", "safetensors", "numpy")
# Configs carry where they were loaded from, which says nothing of the model.
_PATH_KEYS = ("_name_or_path",)


@dataclass(frozen=True, eq=False)
class CheckpointParts:
    """A checkpoint's contents, from memory or from a folder."""

    manifest: Manifest
    family: Family
    plan: QuantizationPlan
    linears: list[LinearSpec]
    weights: Mapping[str, QuantizedWeight]
    parameters: Mapping[str, Tensor]


class _Nowhere:
    """A sink that keeps nothing: writing to it only measures and hashes."""

    def write(self, data: bytes | memoryview, /) -> None:
        return None


def make_parts(
    model: DiffusionModel,
    plan: QuantizationPlan,
    weights: Mapping[str, QuantizedWeight],
    provenance: Mapping[str, Any],
    metrics: Mapping[str, Any],
    progress: Progress,
) -> CheckpointParts:
    """The parts of a checkpoint of `model` quantized by `plan`; see `QuantizedCheckpoint`."""
    family = model.family
    config = _json(_without_paths(model.config), "the model's config")
    family.tie_shared_modules(model.denoiser)
    ties = find_ties(model.denoiser)
    tensors = stored_tensors(model.denoiser, shared_once=False)
    shape = outline(family, config, len(tensors) + len(weights))
    linears = family.linears(shape)
    plan.check(linears)
    apply_ties(shape, ties, {spec.name: None for spec in linears})
    _check_weights(plan, linears, weights)
    skipped = {f"{spec.name}.weight" for spec in quantized_linears(plan, linears)}
    parameters = {
        name: stored_parameter(_found(tensors, name, size), name)
        for name, size in stored_shapes(shape).items()
        if name not in skipped
    }
    ordered = {spec.name: weights[spec.name] for spec in quantized_linears(plan, linears)}
    plan = plan_in_order(plan, linears)
    written = write_contents(
        _Nowhere(), plan, linears, ordered, parameters, progress, "packing weights"
    )
    manifest = Manifest(
        format=FORMAT,
        version=schema_version(plan),
        model=_model_entry(model, config),
        plan=_json(plan.to_json(), "the plan"),
        linears=linear_entries(linears),
        ties=ties,
        weights=WeightsEntry(file=WEIGHTS_NAME, bytes=written.bytes, sha256=written.sha256),
        provenance=_provenance(provenance),
        metrics=_json(metrics, "the metrics"),
    )
    return CheckpointParts(manifest, family, plan, linears, ordered, parameters)


def linear_entries(linears: list[LinearSpec]) -> tuple[LinearEntry, ...]:
    """The manifest's table of linears, in model order."""
    return tuple(
        LinearEntry(
            name=spec.name,
            in_features=spec.in_features,
            out_features=spec.out_features,
            has_bias=bool(spec.has_bias),
        )
        for spec in linears
    )


def plan_in_order(plan: QuantizationPlan, linears: list[LinearSpec]) -> QuantizationPlan:
    """The same plan with its layers in model order."""
    return QuantizationPlan(plan.bits, {spec.name: plan[spec.name] for spec in linears})


def write_contents(
    handle: Sink,
    plan: QuantizationPlan,
    linears: list[LinearSpec],
    weights: Mapping[str, QuantizedWeight],
    parameters: Mapping[str, Tensor],
    progress: Progress,
    description: str,
) -> Written:
    """Write the tensor file, packing one weight at a time."""
    entries = {name: TensorEntry.of(value) for name, value in parameters.items()}
    parts: dict[str, tuple[str, LayerScheme, str]] = {}
    for spec in quantized_linears(plan, linears):
        scheme = plan[spec.name]
        for part, entry in weight_entries(spec, scheme).items():
            name = tensor_name(spec.name, part)
            entries[name] = entry
            parts[name] = (spec.name, scheme, part)

    def tensor(name: str) -> Tensor:
        if name in parameters:
            return parameters[name]
        linear, scheme, part = parts[name]
        return encode_part(weights[linear], scheme, part)

    return write_tensors(handle, entries, tensor, progress, description)


def _check_weights(
    plan: QuantizationPlan, linears: list[LinearSpec], weights: Mapping[str, QuantizedWeight]
) -> None:
    specs = {spec.name: spec for spec in quantized_linears(plan, linears)}
    for name in weights:
        if name not in specs:
            raise InputError(f"there are quantized weights for {name}, which the plan leaves alone")
    for name, spec in specs.items():
        if name not in weights:
            raise InputError(f"the plan quantizes {name}, but it has no quantized weights")
        check_weight(weights[name], spec, plan[name])


def _found(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    if name not in tensors or tuple(tensors[name].shape) != shape:
        found = f"shape {list(tensors[name].shape)}" if name in tensors else "none"
        raise InputError(
            f"the model's config calls for the parameter {name} of shape {list(shape)}, "
            f"the model has {found}; load the model again"
        )
    return tensors[name]


def _without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _PATH_KEYS}


def _json(value: Mapping[str, Any], what: str) -> dict[str, Any]:
    """`value` as JSON gives it back: plain lists and objects, finite numbers."""
    try:
        plain: dict[str, Any] = json.loads(canonical_json(dict(value)))
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} must be finite JSON data: {error}") from error
    return plain


def _model_entry(model: DiffusionModel, config: dict[str, Any]) -> ModelEntry:
    return ModelEntry(
        name=model.name,
        family=model.family.name,
        config=config,
        scheduler_config=_json(_without_paths(model.scheduler_config), "the scheduler's config"),
        class_names=tuple(model.class_names),
        source=SourceEntry(**asdict(model.source)),
    )


def _provenance(settings: Mapping[str, Any]) -> Provenance:
    from .. import __version__

    libraries = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return Provenance(
        qdit=__version__, libraries=libraries, settings=_json(settings, "the provenance")
    )
