"""The part of a checkpoint's size that no choice of groups changes."""

from __future__ import annotations

import json
from dataclasses import asdict

from ...files import canonical_json
from ..checkpoint_layout import (
    quantized_linears,
    stored_parameter,
    tensor_name,
    weight_entries,
)
from ..checkpoint_make import linear_entries
from ..checkpoint_manifest import schema_version
from ..checkpoint_model import find_ties, stored_tensors
from ..model import DiffusionModel
from ..plan import QuantizationPlan
from ..schemes import LayerScheme
from ..tensor_file import TensorEntry, header_bytes

# What the manifest holds beyond the model and the plan: measured on the demo model's checkpoint.
_PROVENANCE_BYTES = 700
_FLOAT_SCALES_BYTES = 110
_METRICS_BYTES = 90  # a linear: two errors of 17 digits with their keys


def fixed_checkpoint_bytes(model: DiffusionModel, plan: QuantizationPlan) -> int:
    """Bytes of `qdit.json` and `weights.safetensors` but for the quantized weights.

    `model` is the full-precision one; equal modules of it are tied, as a checkpoint ties them.
    Untouched parameters are exact. The tensor file's header and the manifest's plan are those of
    `plan`; another plan of the same bits differs by some digits in them, a few bytes a linear.
    The manifest's provenance and metrics are estimated, to within about a kilobyte.
    """
    model.family.tie_shared_modules(model.denoiser)
    linears = model.linears
    quantized = quantized_linears(plan, linears)
    skipped = {f"{spec.name}.weight" for spec in linears}
    entries = {
        name: TensorEntry.of(stored_parameter(value, name))
        for name, value in stored_tensors(model.denoiser).items()
        if name not in skipped
    }
    untouched = sum(entry.byte_size for entry in entries.values())
    for spec in linears:
        if spec not in quantized:
            entries[f"{spec.name}.weight"] = TensorEntry(
                "F16", (spec.out_features, spec.in_features)
            )
    for spec in quantized:
        for part, entry in weight_entries(spec, plan[spec.name]).items():
            entries[tensor_name(spec.name, part)] = entry
    return untouched + len(header_bytes(entries)) + _manifest_bytes(model, plan)


def _manifest_bytes(model: DiffusionModel, plan: QuantizationPlan) -> int:
    linears = model.linears
    known = {
        "format": "qdit-checkpoint",
        "version": schema_version(plan),
        "model": {
            "name": model.name,
            "family": model.family.name,
            "config": model.config,
            "scheduler_config": model.scheduler_config,
            "class_names": list(model.class_names),
            "source": asdict(model.source),
        },
        "plan": plan.to_json(),
        "linears": [entry.model_dump() for entry in linear_entries(linears)],
        "ties": find_ties(model.denoiser),
        "weights": {"file": "weights.safetensors", "bytes": 10**8, "sha256": "0" * 64},
    }
    # configs may hold tuples and other values that JSON writes in its own way
    text = canonical_json(json.loads(json.dumps(known, default=str)))
    metrics = sum(len(spec.name) + _metrics_bytes(plan[spec.name]) for spec in linears)
    return len(text.encode()) + _PROVENANCE_BYTES + metrics


def _metrics_bytes(scheme: LayerScheme) -> int:
    """With integer scales the errors of float ones are there too."""
    return _METRICS_BYTES + (_FLOAT_SCALES_BYTES if scheme.has_integer_scales else 0)
