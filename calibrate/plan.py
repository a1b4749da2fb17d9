"""The quantization plan: one `LayerScheme` for each linear of a model, as frozen, checked data."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from ..errors import InputError
from ..files import sha256_of_json, write_json
from .schemes import LayerScheme

PLAN_VERSION = 1

Role = Literal["attention_qkv", "attention_out", "mlp_in", "mlp_out", "adaln"]


@dataclass(frozen=True)
class LinearSpec:
    """One linear that a family offers for quantization: weight [N, K], input [..., K].

    `name` is its path in the denoiser ('transformer_blocks.0.attn1.to_q'), `block` its block's
    position. Linears that read the very same tensor share `input_name` (q, k and v do).
    """

    name: str
    role: Role
    block: int
    in_features: int
    out_features: int
    has_bias: bool
    input_name: str

    @property
    def weight_count(self) -> int:
        return self.in_features * self.out_features


@dataclass(frozen=True)
class QuantizationPlan:
    """Schemes by linear name, in model order, plus the preset's label ('w4a8', or 'custom')."""

    bits: str
    layers: Mapping[str, LayerScheme]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))

    def __getitem__(self, name: str) -> LayerScheme:
        return self.layers[name]

    def __reduce__(self) -> tuple[Any, ...]:  # MappingProxyType does not pickle; workers need it
        return (QuantizationPlan, (self.bits, dict(self.layers)))

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def digest(self) -> str:
        """SHA-256 of the plan's JSON."""
        return sha256_of_json(self.to_json())

    def to_json(self) -> dict[str, Any]:
        return {
            "version": PLAN_VERSION,
            "bits": self.bits,
            "layers": {name: scheme.to_json() for name, scheme in self.layers.items()},
        }

    @classmethod
    def from_json(cls, value: object) -> QuantizationPlan:
        """The inverse of `to_json`: nothing may be missing or unknown. Raises `InputError`."""
        if not isinstance(value, dict) or set(value) != {"version", "bits", "layers"}:
            raise InputError("a full plan must be a JSON object of version, bits and layers")
        if value["version"] != PLAN_VERSION or isinstance(value["version"], bool):
            raise InputError(f"plan version must be {PLAN_VERSION}, got {value['version']!r}")
        if not isinstance(value["bits"], str) or not isinstance(value["layers"], dict):
            raise InputError("'layers' must be a JSON object and 'bits' a string in a plan")
        layers = {name: _layer(name, scheme) for name, scheme in value["layers"].items()}
        return cls(value["bits"], layers)

    def write(self, path: Path) -> None:
        """Write as JSON that `--plan` reads back."""
        write_json(path, self.to_json())

    def check(self, linears: Sequence[LinearSpec]) -> None:
        """Raise `InputError` unless the plan names exactly `linears` and fits every one of them."""
        names = {spec.name for spec in linears}
        for name in self.layers:
            if name not in names:
                raise InputError(_unknown_layer(name, names))
        for spec in linears:
            if spec.name not in self.layers:
                raise InputError(f"the plan has no scheme for linear {spec.name}; add one")
            scheme = self.layers[spec.name]
            scheme.check_fits(spec.name, spec.in_features)
            if spec.role == "adaln" and scheme.quantizes_activations:
                raise InputError(
                    f"adaLN linears are quantized weight-only, got activation bits "
                    f"{scheme.activation_bits} for {spec.name}; set activation_bits to 16"
                )

    def effective_weight_bits(self, linears: Iterable[LinearSpec]) -> float:
        """Bits per weight over the quantized linears, scales and zero points counted."""
        bits = count = 0.0
        for spec in linears:
            bits += self.layers[spec.name].effective_weight_bits(spec.in_features) * (
                spec.weight_count
            )
            count += spec.weight_count
        return bits / count


def _layer(name: str, value: object) -> LayerScheme:
    try:
        return LayerScheme.from_json(value)
    except InputError as error:
        raise InputError(f"the plan's layer {name}: {error}") from error


def uniform_plan(bits: str, scheme: LayerScheme, linears: Sequence[LinearSpec]) -> QuantizationPlan:
    """The same scheme for every linear; adaLN linears weight-only (Q-DiT keeps their input)."""
    layers = {
        spec.name: scheme.weight_only() if spec.role == "adaln" else scheme for spec in linears
    }
    plan = QuantizationPlan(bits, layers)
    plan.check(linears)
    return plan


def read_plan(
    path: Path, default: QuantizationPlan, linears: Sequence[LinearSpec]
) -> QuantizationPlan:
    """Read a plan file: `{"version": 1, "bits": …, "layers": {name: {scheme keys}}}`.

    A layer's object may be partial, and layers may be missing: what is not said comes from
    `default`. Unknown keys, unknown layers and versions from the future are refused.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no plan file at {path}; write one or leave --plan out") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not a readable JSON plan: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"a plan must be a JSON object, got {type(value).__name__} in {path}")
    for key in value:
        if key not in ("version", "bits", "layers"):
            raise InputError(f"unknown plan key {key!r} in {path}; keys are version, bits, layers")
    if value.get("version") != PLAN_VERSION:
        raise InputError(
            f"plan version must be {PLAN_VERSION}, got {value.get('version')!r} in {path}"
        )
    return _merge(value, default, linears, path)


def _merge(
    value: dict[str, Any],
    default: QuantizationPlan,
    linears: Sequence[LinearSpec],
    path: Path,
) -> QuantizationPlan:
    layers = value.get("layers", {})
    bits = value.get("bits", default.bits)
    if not isinstance(layers, dict) or not isinstance(bits, str):
        raise InputError(f"'layers' must be a JSON object and 'bits' a string in {path}")
    merged = dict(default.layers)
    for name, given in layers.items():
        if name not in merged:
            raise InputError(_unknown_layer(name, set(merged)))
        if not isinstance(given, dict):
            raise InputError(f"the scheme of {name} must be a JSON object in {path}")
        try:
            merged[name] = LayerScheme.from_json(merged[name].to_json() | given)
        except InputError as error:
            raise InputError(f"{path}, layer {name}: {error}") from error
    plan = QuantizationPlan(bits, merged)
    plan.check(linears)
    return plan


def _unknown_layer(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    hint = (
        f"did you mean {close[0]}?" if close else f"the first one is {min(known, default='none')}"
    )
    return f"the plan names {name!r}, which is no quantizable linear of this model; {hint}"
