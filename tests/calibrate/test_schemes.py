"""Layer schemes: what can be built, what cannot, and the arithmetic of groups and bits."""

from __future__ import annotations

import dataclasses
import itertools
import json
from fractions import Fraction
from typing import Any

import pytest

from qdit.calibrate.schemes import (
    ACTIVATION_BITS,
    GROUP_SIZES,
    PRESETS,
    WEIGHT_BITS,
    LayerScheme,
    preset_bits,
)
from qdit.errors import InputError

ILLEGAL = [
    pytest.param({"weight_bits": 5}, r"weight bits must be one of 2, 3, 4, 6, 8, 16, got 5"),
    pytest.param({"weight_bits": 1}, r"weight bits must be .* got 1$"),
    pytest.param({"weight_bits": 32}, r"weight bits must be .* got 32$"),
    pytest.param({"weight_bits": True}, r"weight bits must be .* got True$", id="bool bits"),
    pytest.param({"weight_bits": 4.0}, r"weight bits must be .* got 4\.0$", id="float bits"),
    pytest.param({"weight_bits": "4"}, r"weight bits must be .* got '4'$", id="text bits"),
    pytest.param({"activation_bits": 3}, r"activation bits must be one of 4, 6, 8, 16, got 3"),
    pytest.param({"activation_bits": None}, r"activation bits must be .* got None$"),
    pytest.param({"weight_group": 0}, r"weight group must be one of 32, .*, channel, got 0"),
    pytest.param({"weight_group": 48}, r"weight group must be .* got 48$"),
    pytest.param({"weight_group": "token"}, r"weight group must be .* channel, got 'token'"),
    pytest.param({"weight_group": 128.0}, r"weight group must be .* got 128\.0$"),
    pytest.param({"activation_group": 16}, r"activation group must be .*, token, got 16"),
    pytest.param({"activation_group": "channel"}, r"activation group must .* got 'channel'"),
    pytest.param({"activation_group": [128]}, r"activation group must be .* got \[128\]"),
    pytest.param({"weight_symmetric": 1}, r"weight_symmetric must be true or false, got 1"),
    pytest.param({"activation_symmetric": "no"}, r"activation_symmetric must be true or .*'no'"),
    pytest.param({"scale_dtype": "bfloat16"}, r"scale dtype must be one of float16, float32, got"),
    pytest.param({"scale_format": "int"}, r"scale format must be one of float, integer, got 'int'"),
    pytest.param({"scale_format": None}, r"scale format must be one of float, integer, got None"),
    pytest.param(
        {"weight_bits": 6, "scale_format": "integer"},
        r"integer scales need weights of 2, 3, 4 bits, got 6: .* fit int8; use scale format float",
        id="6 bits in integer scales",
    ),
    pytest.param(
        {"weight_bits": 8, "scale_format": "integer"},
        r"integer scales need weights of 2, 3, 4 bits, got 8",
        id="8 bits in integer scales",
    ),
    pytest.param(
        {"weight_symmetric": False, "scale_format": "integer"},
        r"integer scales need symmetric weights, got asymmetric ones: .* or scale format float",
        id="asymmetric integer scales",
    ),
]


@pytest.mark.parametrize(("fields", "message"), ILLEGAL)
def test_illegal_fields_are_refused_with_the_choices(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LayerScheme(**fields)
    with pytest.raises(InputError, match=message):
        LayerScheme.from_json(fields)


LEGAL_BITS = list(itertools.product(WEIGHT_BITS, ACTIVATION_BITS))


@pytest.mark.parametrize(
    ("weight_bits", "activation_bits"), LEGAL_BITS, ids=[f"w{w}a{a}" for w, a in LEGAL_BITS]
)
def test_every_pair_of_bits_is_built_or_refused_by_the_rule(
    weight_bits: int, activation_bits: int
) -> None:
    if weight_bits == 16 and activation_bits != 16:
        with pytest.raises(InputError, match=r"activations need quantized weights, got weight bit"):
            LayerScheme(weight_bits, activation_bits)
    else:
        scheme = LayerScheme(weight_bits, activation_bits)
        assert scheme.quantizes_weights == (weight_bits < 16)
        assert scheme.quantizes_activations == (activation_bits < 16)


def test_a_sixteen_bit_side_forgets_its_group_and_symmetry() -> None:
    weight_only = LayerScheme(4, 16, 64, 32, activation_symmetric=False)
    assert weight_only == LayerScheme(4, 16, 64, "token")
    assert (weight_only.activation_group, weight_only.activation_symmetric) == ("token", True)
    untouched = LayerScheme(16, 16, 64, 32, weight_symmetric=False)
    assert untouched == LayerScheme(16, 16)
    assert (untouched.weight_group, untouched.weight_symmetric) == ("channel", True)
    assert hash(untouched) == hash(LayerScheme(16, 16))


@pytest.mark.parametrize(
    "fields",
    [
        {"weight_group": "channel"},
        {"weight_group": "channel", "weight_bits": 8},
        {"weight_group": "channel", "weight_symmetric": False},
        {"weight_bits": 16, "activation_bits": 16},
    ],
    ids=["channel", "channel w8", "channel asymmetric", "16 bits"],
)
def test_integer_scales_without_groups_are_float_ones(fields: dict[str, Any]) -> None:
    scheme = LayerScheme(**fields, scale_format="integer")
    assert scheme == LayerScheme(**fields)
    assert not scheme.has_integer_scales


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("activation_bits", [4, 6, 8, 16])
@pytest.mark.parametrize("group", GROUP_SIZES)
def test_integer_scales_go_with_all_else(bits: int, activation_bits: int, group: int) -> None:
    scheme = LayerScheme(
        bits, activation_bits, group, "token", activation_symmetric=False, scale_format="integer"
    )
    assert scheme.has_integer_scales
    assert scheme != LayerScheme(bits, activation_bits, group, "token", activation_symmetric=False)
    assert scheme.weight_only().has_integer_scales
    assert scheme.with_float_scales() == dataclasses.replace(scheme, scale_format="float")
    coarse = dataclasses.replace(scheme, weight_group="channel")
    assert not coarse.has_integer_scales


def test_schemes_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LayerScheme().weight_bits = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("scheme", "label"),
    [
        (LayerScheme(), "w4 g128 · a8 g128"),
        (LayerScheme(8, 8, "channel", "token"), "w8 channel · a8 token"),
        (LayerScheme(3, 6, 64, 96, weight_symmetric=False), "w3 g64 asym · a6 g96"),
        (LayerScheme(4, 8, 64, 32, activation_symmetric=False), "w4 g64 · a8 g32 asym"),
        (LayerScheme(4, 16, 64, weight_symmetric=False), "w4 g64 asym · a16"),
        (LayerScheme(16, 16), "w16 · a16"),
        (LayerScheme(4, 8, 64, "token", scale_format="integer"), "w4 g64 int · a8 token"),
        (LayerScheme(3, 16, 64, scale_format="integer"), "w3 g64 int · a16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_labels_say_bits_groups_and_asymmetry(scheme: LayerScheme, label: str) -> None:
    assert scheme.label == label


def test_labels_tell_different_schemes_apart() -> None:
    schemes = {
        LayerScheme(weight, activation, weight_group, "token", symmetric, symmetric)
        for (weight, activation), weight_group, symmetric in itertools.product(
            [pair for pair in LEGAL_BITS if pair[0] < 16], (32, "channel"), (True, False)
        )
    }
    schemes |= {
        dataclasses.replace(scheme, scale_format="integer")
        for scheme in schemes
        if scheme.weight_bits <= 4 and scheme.weight_symmetric
    }
    assert len({scheme.label for scheme in schemes}) == len(schemes)


# By hand: b + (scale bits + zero-point bits) / g; with integer scales b + 4/g + scale bits / K
@pytest.mark.parametrize(
    ("scheme", "in_features", "bits"),
    [
        (LayerScheme(4, 8, 128), 1152, Fraction(4) + Fraction(16, 128)),  # 4.125
        (LayerScheme(4, 8, 128, weight_symmetric=False), 1152, Fraction(4) + Fraction(20, 128)),
        (LayerScheme(4, 8, 128, scale_dtype="float32"), 1152, Fraction(4) + Fraction(32, 128)),
        (LayerScheme(3, 8, 32, weight_symmetric=False), 1152, Fraction(3) + Fraction(19, 32)),
        (LayerScheme(8, 8, "channel"), 1152, Fraction(8) + Fraction(16, 1152)),
        (LayerScheme(8, 8, "channel", scale_dtype="float32"), 32, Fraction(9)),
        (LayerScheme(16, 16), 1152, Fraction(16)),
        (
            LayerScheme(4, 8, 128, scale_format="integer"),
            1152,
            Fraction(4) + Fraction(4, 128) + Fraction(16, 1152),  # 4.0451
        ),
        (
            LayerScheme(3, 16, 32, scale_dtype="float32", scale_format="integer"),
            4608,
            Fraction(3) + Fraction(4, 32) + Fraction(32, 4608),
        ),
    ],
    ids=[
        "w4 g128",
        "w4 g128 asym",
        "w4 g128 f32",
        "w3 g32 asym",
        "w8 channel",
        "w8 k32",
        "w16",
        "w4 g128 int",
        "w3 g32 int f32",
    ],
)
def test_effective_bits_count_scales_and_zero_points(
    scheme: LayerScheme, in_features: int, bits: Fraction
) -> None:
    assert scheme.effective_weight_bits(in_features) == pytest.approx(float(bits), rel=1e-15)


def test_the_figures_of_the_published_scheme() -> None:
    assert LayerScheme(4, 8, 128).effective_weight_bits(1152) == 4.125
    assert LayerScheme(4, 8, 128, weight_symmetric=False).effective_weight_bits(1152) == 4.15625


@pytest.mark.parametrize("in_features", [256, 1024, 1152, 4608])
@pytest.mark.parametrize("group", GROUP_SIZES)
@pytest.mark.parametrize("side", ["weight", "activation"])
def test_groups_must_divide_the_input_channels(side: str, group: int, in_features: int) -> None:
    scheme = dataclasses.replace(LayerScheme(4, 8, "channel", "token"), **{f"{side}_group": group})
    if in_features % group == 0:
        scheme.check_fits("layer", in_features)
        size = getattr(scheme, f"{side}_group_size")(in_features)
        assert size == group
        return
    coarsest = "channel" if side == "weight" else "token"
    fitting = ", ".join(str(g) for g in GROUP_SIZES if in_features % g == 0)
    with pytest.raises(
        InputError,
        match=rf"{side} group size must divide the {in_features} input channels of layer, "
        rf"got {group}; use one of {fitting}, {coarsest}$",
    ):
        scheme.check_fits("layer", in_features)


def test_channel_and_token_fit_every_layer() -> None:
    scheme = LayerScheme(4, 8, "channel", "token")
    for in_features in (1, 7, 1152):
        scheme.check_fits("layer", in_features)
        assert scheme.weight_group_size(in_features) == in_features
        assert scheme.activation_group_size(in_features) == in_features


def test_weight_only_changes_the_activation_side_alone() -> None:
    scheme = LayerScheme(3, 6, 64, 32, False, False, "float32")
    assert scheme.weight_only() == LayerScheme(3, 16, 64, "token", False, True, "float32")
    assert LayerScheme(16, 16).weight_only() == LayerScheme(16, 16)


def test_json_comes_back_equal() -> None:
    for (weight, activation), group in itertools.product(LEGAL_BITS, (64, "channel")):
        if weight == 16 and activation != 16:
            continue
        scheme = LayerScheme(weight, activation, group, 96, False, False, "float32")
        assert LayerScheme.from_json(json.loads(json.dumps(scheme.to_json()))) == scheme


def test_integer_scales_come_back_from_json() -> None:
    for bits, group in itertools.product((2, 3, 4), (32, 1152)):
        scheme = LayerScheme(bits, 8, group, 96, scale_format="integer")
        value = scheme.to_json()
        assert value["scale_format"] == "integer"
        assert LayerScheme.from_json(json.loads(json.dumps(value))) == scheme


def test_float_scales_are_written_as_before_there_were_others() -> None:
    before = {
        "weight_bits": 4,
        "activation_bits": 8,
        "weight_group": 64,
        "activation_group": 32,
        "weight_symmetric": True,
        "activation_symmetric": False,
        "scale_dtype": "float16",
    }
    scheme = LayerScheme(4, 8, 64, 32, activation_symmetric=False)
    assert scheme.to_json() == before
    assert LayerScheme.from_json(before) == scheme
    assert LayerScheme.from_json(before | {"scale_format": "float"}) == scheme


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([4, 8], "a layer scheme must be a JSON object, got list"),
        (None, "a layer scheme must be a JSON object, got NoneType"),
        ({"bits": 4}, "unknown scheme key 'bits'; the keys are weight_bits, activation_bits, "),
    ],
    ids=["list", "null", "unknown key"],
)
def test_other_json_is_refused(value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LayerScheme.from_json(value)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_legal_schemes(preset: str) -> None:
    weight_bits, activation_bits = preset_bits(preset)
    scheme = LayerScheme(weight_bits, activation_bits)
    assert preset == f"w{scheme.weight_bits}a{scheme.activation_bits}"


@pytest.mark.parametrize(
    ("preset", "bits"), [("w4a8", (4, 8)), ("W4A8", (4, 8)), ("16/16", (16, 16))]
)
def test_presets_are_read_in_the_ways_people_write_them(preset: str, bits: tuple[int, int]) -> None:
    assert preset_bits(preset) == bits


@pytest.mark.parametrize("preset", ["w5a8", "w2a8", "4", "", "w4a8 ", "w16a8"])
def test_unknown_presets_list_the_known_ones(preset: str) -> None:
    with pytest.raises(InputError, match=rf"bits must be one of w8a8, .*w16a16 .*got '{preset}'"):
        preset_bits(preset)
