"""How one linear is quantized: bits, group sizes, symmetry. Illegal combinations cannot be built.

Shapes, for a linear with weight [N, K] and input [..., K]:

* weight group g → one scale (and zero point) per output channel and group: [N, K/g];
  'channel' → [N, 1].
* activation group g → one scale per token and group, computed at run time: [..., K/g];
  'token' → [..., 1].

Source: Q-DiT (arXiv 2406.17343), section 3.2, with weight and activation groups kept apart.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from ..errors import InputError

WeightGroup = int | Literal["channel"]
ActivationGroup = int | Literal["token"]
ScaleDtype = Literal["float16", "float32"]

UNQUANTIZED_BITS = 16
WEIGHT_BITS = (2, 3, 4, 6, 8, UNQUANTIZED_BITS)
ACTIVATION_BITS = (4, 6, 8, UNQUANTIZED_BITS)
GROUP_SIZES = (32, 64, 96, 128, 144, 192, 256, 288, 384, 512, 576, 768, 1024, 1152)
PRESETS = ("w8a8", "w6a8", "w4a8", "w3a8", "w4a6", "w4a4", "w8a16", "w4a16", "w16a16")


def _choices(values: tuple[Any, ...]) -> str:
    return ", ".join(str(value) for value in values)


def _check_member(what: str, value: object, allowed: tuple[Any, ...]) -> None:
    # True == 1 and 4.0 == 4 in Python: neither a bool nor a float may pass as a number of bits
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        raise InputError(f"{what} must be one of {_choices(allowed)}, got {value!r}")


def _check_bool(what: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InputError(f"{what} must be true or false, got {value!r}")


@dataclass(frozen=True)
class LayerScheme:
    """The quantization of one linear. 16 bits means 'left as it is'.

    Raises `InputError` at construction for every combination without a meaning:

    1. bits outside `WEIGHT_BITS` / `ACTIVATION_BITS`;
    2. a group outside `GROUP_SIZES` and 'channel' (weights) or 'token' (activations);
    3. quantized activations under 16-bit weights: no target runs such a product;
    4. a scale dtype other than float16 or float32.

    A 16-bit side has no groups; its group is normalized to 'channel' / 'token' and it counts as
    symmetric, so that two schemes that do the same compare equal.
    """

    weight_bits: int = 4
    activation_bits: int = 8
    weight_group: WeightGroup = 128
    activation_group: ActivationGroup = 128
    weight_symmetric: bool = True
    activation_symmetric: bool = True
    scale_dtype: ScaleDtype = "float16"

    def __post_init__(self) -> None:
        _check_member("weight bits", self.weight_bits, WEIGHT_BITS)
        _check_member("activation bits", self.activation_bits, ACTIVATION_BITS)
        _check_member("weight group", self.weight_group, (*GROUP_SIZES, "channel"))
        _check_member("activation group", self.activation_group, (*GROUP_SIZES, "token"))
        _check_bool("weight_symmetric", self.weight_symmetric)
        _check_bool("activation_symmetric", self.activation_symmetric)
        _check_member("scale dtype", self.scale_dtype, get_args(ScaleDtype))
        if not self.quantizes_weights and self.quantizes_activations:
            raise InputError(
                f"{self.activation_bits}-bit activations need quantized weights, got weight bits "
                f"{self.weight_bits}; use weight bits {_choices(WEIGHT_BITS[:-1])} "
                f"or activation bits {UNQUANTIZED_BITS}"
            )
        if not self.quantizes_weights:
            object.__setattr__(self, "weight_group", "channel")
            object.__setattr__(self, "weight_symmetric", True)
        if not self.quantizes_activations:
            object.__setattr__(self, "activation_group", "token")
            object.__setattr__(self, "activation_symmetric", True)

    @property
    def quantizes_weights(self) -> bool:
        return self.weight_bits != UNQUANTIZED_BITS

    @property
    def quantizes_activations(self) -> bool:
        return self.activation_bits != UNQUANTIZED_BITS

    @property
    def label(self) -> str:
        """Short text for tables: 'w4 g64 · a8 token', with 'asym' where a side is asymmetric."""
        if not self.quantizes_weights:
            return "w16 · a16"
        weight = f"w{self.weight_bits} {_group_label(self.weight_group)}"
        weight += "" if self.weight_symmetric else " asym"
        if not self.quantizes_activations:
            return f"{weight} · a16"
        activation = f"a{self.activation_bits} {_group_label(self.activation_group)}"
        return f"{weight} · {activation}" + ("" if self.activation_symmetric else " asym")

    def weight_group_size(self, in_features: int) -> int:
        """Input channels that share one weight scale, for a layer of K = `in_features`."""
        return in_features if self.weight_group == "channel" else self.weight_group

    def activation_group_size(self, in_features: int) -> int:
        """Input channels that share one activation scale, for a layer of K = `in_features`."""
        return in_features if self.activation_group == "token" else self.activation_group

    def check_fits(self, name: str, in_features: int) -> None:
        """Raise `InputError` unless both groups divide the layer's `in_features`."""
        for side, size in (
            ("weight", self.weight_group_size(in_features)),
            ("activation", self.activation_group_size(in_features)),
        ):
            if in_features % size:
                fitting = tuple(g for g in GROUP_SIZES if in_features % g == 0)
                coarsest = "channel" if side == "weight" else "token"
                raise InputError(
                    f"{side} group size must divide the {in_features} input channels of {name}, "
                    f"got {size}; use one of {_choices((*fitting, coarsest))}"
                )

    def weight_only(self) -> LayerScheme:
        """The same weights with activations left at 16 bits."""
        return replace(self, activation_bits=UNQUANTIZED_BITS)

    def effective_weight_bits(self, in_features: int) -> float:
        """Bits per weight with scales and zero points counted.

        b + (scale bits + zero-point bits) / g; a zero point is stored with the weight's bits.
        """
        if not self.quantizes_weights:
            return float(UNQUANTIZED_BITS)
        overhead = 16 if self.scale_dtype == "float16" else 32
        if not self.weight_symmetric:
            overhead += self.weight_bits
        return self.weight_bits + overhead / self.weight_group_size(in_features)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: object) -> LayerScheme:
        """Build from a JSON object; unknown keys are refused."""
        if not isinstance(value, dict):
            raise InputError(f"a layer scheme must be a JSON object, got {type(value).__name__}")
        known = tuple(cls.__dataclass_fields__)
        for key in value:
            if key not in known:
                raise InputError(f"unknown scheme key {key!r}; the keys are {_choices(known)}")
        return cls(**value)


def _group_label(group: int | str) -> str:
    return f"g{group}" if isinstance(group, int) else group


def preset_bits(preset: str) -> tuple[int, int]:
    """(weight bits, activation bits) of a preset such as 'w4a8'. '16/16' is 'w16a16'."""
    name = "w16a16" if preset == "16/16" else preset.lower()
    if name not in PRESETS:
        raise InputError(f"bits must be one of {_choices(PRESETS)} (or 16/16), got {preset!r}")
    match = re.fullmatch(r"w(\d+)a(\d+)", name)
    if match is None:  # PRESETS are written above; a typo there must not pass silently
        raise ValueError(f"malformed preset {name}")
    return int(match[1]), int(match[2])
