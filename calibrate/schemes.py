"""How one linear is quantized: bits, group sizes, symmetry. Illegal combinations cannot be built.

Shapes, for a linear with weight [N, K] and input [..., K]:

* weight group g → one scale (and zero point) per output channel and group: [N, K/g];
  'channel' → [N, 1]. With `scale_format` 'integer' the scales of a channel are small integers
  [N, K/g] times one float [N, 1].
* activation group g → one scale per token and group, computed at run time: [..., K/g];
  'token' → [..., 1].

Source: Q-DiT (arXiv 2406.17343), section 3.2, with weight and activation groups kept apart; integer
scales are the second level of QServe's progressive quantization (arXiv 2405.04532, section 4.1).
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from ..errors import InputError

WeightGroup = int | Literal["channel"]
ActivationGroup = int | Literal["token"]
ScaleDtype = Literal["float16", "float32"]
ScaleFormat = Literal["float", "integer"]

UNQUANTIZED_BITS = 16
WEIGHT_BITS = (2, 3, 4, 6, 8, UNQUANTIZED_BITS)
ACTIVATION_BITS = (4, 6, 8, UNQUANTIZED_BITS)
# |q·m| ≤ 2^(b−1)·16 ≤ 128 for b ≤ 4, and the one value of 128 is negative: −8·16 fits int8.
INTEGER_SCALE_BITS = (2, 3, 4)
MULTIPLIER_BITS = 4
LARGEST_MULTIPLIER = 1 << MULTIPLIER_BITS
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
    4. a scale dtype other than float16 or float32;
    5. a scale format other than float or integer;
    6. integer scales of weights outside `INTEGER_SCALE_BITS`: times 16 they would not fit int8;
    7. integer scales of asymmetric weights: there is no zero point in an int8 product.

    Two schemes that do the same compare equal, so what means nothing is normalized:

    8. a 16-bit side has no groups: its group becomes 'channel' / 'token', and it is symmetric;
    9. 16-bit weights have no scales, and 'channel' ones a single float: their format is 'float'.
    """

    weight_bits: int = 4
    activation_bits: int = 8
    weight_group: WeightGroup = 128
    activation_group: ActivationGroup = 128
    weight_symmetric: bool = True
    activation_symmetric: bool = True
    scale_dtype: ScaleDtype = "float16"
    scale_format: ScaleFormat = "float"

    def __post_init__(self) -> None:
        _check_member("weight bits", self.weight_bits, WEIGHT_BITS)
        _check_member("activation bits", self.activation_bits, ACTIVATION_BITS)
        _check_member("weight group", self.weight_group, (*GROUP_SIZES, "channel"))
        _check_member("activation group", self.activation_group, (*GROUP_SIZES, "token"))
        _check_bool("weight_symmetric", self.weight_symmetric)
        _check_bool("activation_symmetric", self.activation_symmetric)
        _check_member("scale dtype", self.scale_dtype, get_args(ScaleDtype))
        _check_member("scale format", self.scale_format, get_args(ScaleFormat))
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
        if self.weight_group == "channel":
            object.__setattr__(self, "scale_format", "float")
        if self.has_integer_scales:
            self._check_integer_scales()

    def _check_integer_scales(self) -> None:
        if self.weight_bits not in INTEGER_SCALE_BITS:
            raise InputError(
                f"integer scales need weights of {_choices(INTEGER_SCALE_BITS)} bits, got "
                f"{self.weight_bits}: times {LARGEST_MULTIPLIER} they must fit int8; use scale "
                "format float"
            )
        if not self.weight_symmetric:
            raise InputError(
                "integer scales need symmetric weights, got asymmetric ones: an int8 product has "
                "no zero points; use symmetric weights or scale format float"
            )

    @property
    def quantizes_weights(self) -> bool:
        return self.weight_bits != UNQUANTIZED_BITS

    @property
    def quantizes_activations(self) -> bool:
        return self.activation_bits != UNQUANTIZED_BITS

    @property
    def has_integer_scales(self) -> bool:
        """Whether group scales are an integer 1 … 16 a group times one float a channel."""
        return self.scale_format == "integer"

    @property
    def label(self) -> str:
        """Short text for tables: 'w4 g64 · a8 token', with 'asym' where a side is asymmetric and
        'int' where the group scales are integers."""
        if not self.quantizes_weights:
            return "w16 · a16"
        weight = f"w{self.weight_bits} {_group_label(self.weight_group)}"
        weight += " int" if self.has_integer_scales else ""
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

    def with_float_scales(self) -> LayerScheme:
        """The same groups with a float scale each."""
        return replace(self, scale_format="float")

    def effective_weight_bits(self, in_features: int) -> float:
        """Bits per weight with scales and zero points counted.

        b + (scale bits + zero-point bits) / g; a zero point is stored with the weight's bits.
        With integer scales b + 4/g + scale bits / K: a multiplier a group, a scale a channel.
        """
        if not self.quantizes_weights:
            return float(UNQUANTIZED_BITS)
        size = self.weight_group_size(in_features)
        scale_bits = 16 if self.scale_dtype == "float16" else 32
        if self.has_integer_scales:
            return self.weight_bits + MULTIPLIER_BITS / size + scale_bits / in_features
        zero_point_bits = 0 if self.weight_symmetric else self.weight_bits
        return self.weight_bits + (scale_bits + zero_point_bits) / size

    def to_json(self) -> dict[str, Any]:
        """Every field by name, but for a scale format of 'float', which absence stands for: plans
        without integer scales read as they did before there were any."""
        value = asdict(self)
        if not self.has_integer_scales:
            del value["scale_format"]
        return value

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
