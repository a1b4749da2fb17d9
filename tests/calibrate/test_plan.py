"""Plans: the adaLN rule, JSON in and out, partial overrides, refusals, effective bits by hand."""

from __future__ import annotations

import copy
import json
import pickle  # noqa: TID251 - plans travel to worker processes; nothing is read from a file
from pathlib import Path
from typing import Any

import pytest

from qdit.calibrate.plan import LinearSpec, QuantizationPlan, read_plan, uniform_plan
from qdit.calibrate.schemes import LayerScheme
from qdit.errors import InputError

SCHEME = LayerScheme(4, 8, 64, 64)
ADALN, QUERY, OUT, UP, DOWN = (
    f"transformer_blocks.0.{path}"
    for path in ("norm1.linear", "attn1.to_q", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
)
LINEARS = [
    LinearSpec(ADALN, "adaln", 0, 64, 384, True, "a"),
    LinearSpec(QUERY, "attention_qkv", 0, 64, 64, True, "b"),
    LinearSpec(OUT, "attention_out", 0, 64, 64, True, "c"),
    LinearSpec(UP, "mlp_in", 0, 64, 256, True, "d"),
    LinearSpec(DOWN, "mlp_out", 0, 256, 64, True, "e"),
]


@pytest.fixture
def plan() -> QuantizationPlan:
    return uniform_plan("w4a8", SCHEME, LINEARS)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(value: object) -> Path:
        path = tmp_path / "plan.json"
        path.write_text(value if isinstance(value, str) else json.dumps(value), "utf-8")
        return path

    return write


def test_a_uniform_plan_quantizes_adaln_weight_only(plan: QuantizationPlan) -> None:
    assert list(plan.layers) == [spec.name for spec in LINEARS]
    assert plan[ADALN] == LayerScheme(4, 16, 64)
    assert {plan[spec.name] for spec in LINEARS[1:]} == {SCHEME}


def test_a_uniform_plan_that_fits_no_layer_is_refused() -> None:
    with pytest.raises(InputError, match=rf"divide the 64 input channels of {ADALN}, got 128"):
        uniform_plan("w4a8", LayerScheme(4, 8, 128, 64), LINEARS)


def test_quantized_adaln_activations_are_refused(plan: QuantizationPlan) -> None:
    layers = dict(plan.layers) | {ADALN: SCHEME}
    with pytest.raises(InputError, match=rf"adaLN .* weight-only, got activation bits 8 .*{ADALN}"):
        QuantizationPlan("custom", layers).check(LINEARS)


def test_a_plan_must_name_every_linear_and_no_other(plan: QuantizationPlan) -> None:
    layers = dict(plan.layers)
    del layers[OUT]
    with pytest.raises(InputError, match=rf"no scheme for linear {OUT}; add one"):
        QuantizationPlan("custom", layers).check(LINEARS)
    layers = dict(plan.layers) | {"transformer_blocks.0.attn1.to_qq": SCHEME}
    with pytest.raises(InputError, match=rf"'transformer_blocks.0.attn1.to_qq'.*mean {QUERY}\?"):
        QuantizationPlan("custom", layers).check(LINEARS)


def test_plans_are_frozen_and_keep_nothing_of_the_caller() -> None:
    layers = {QUERY: SCHEME}
    plan = QuantizationPlan("custom", layers)
    layers[QUERY] = LayerScheme(8, 8)
    assert plan[QUERY] == SCHEME
    with pytest.raises(TypeError):
        plan.layers[QUERY] = SCHEME  # type: ignore[index]


def test_equal_plans_are_equal_and_hash_alike_whatever_the_order(plan: QuantizationPlan) -> None:
    backwards = QuantizationPlan("w4a8", dict(reversed(plan.layers.items())))
    assert backwards == plan
    assert hash(backwards) == hash(plan)
    assert backwards.digest == plan.digest
    other = QuantizationPlan("w4a8", dict(plan.layers) | {OUT: LayerScheme(8, 8, 64, 64)})
    assert other != plan
    assert other.digest != plan.digest


INTEGER = LayerScheme(4, 8, 64, "token", scale_format="integer")


def test_scale_formats_make_different_plans_and_leave_the_others_as_they_were(
    plan: QuantizationPlan,
) -> None:
    integer = uniform_plan("w4a8", INTEGER, LINEARS)
    floats = uniform_plan("w4a8", INTEGER.with_float_scales(), LINEARS)
    assert integer[ADALN].has_integer_scales
    assert integer.digest != floats.digest
    # what was written before there were formats is what is written now, and so is its digest
    old = plan.to_json()
    for scheme in old["layers"].values():
        assert set(scheme) == {
            "weight_bits", "activation_bits", "weight_group", "activation_group",
            "weight_symmetric", "activation_symmetric", "scale_dtype",
        }  # fmt: skip
    assert QuantizationPlan.from_json(old) == plan
    explicit = copy.deepcopy(old)
    for scheme in explicit["layers"].values():
        scheme["scale_format"] = "float"
    assert QuantizationPlan.from_json(explicit).digest == plan.digest


def test_a_plan_with_integer_scales_reads_back_equal(tmp_path: Path) -> None:
    plan = uniform_plan("w4a8", INTEGER, LINEARS)
    plan.write(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json", uniform_plan("w4a8", SCHEME, LINEARS), LINEARS) == plan


def test_single_layers_may_have_another_scale_format(plan: QuantizationPlan, write: Any) -> None:
    path = write({"version": 1, "layers": {OUT: {"scale_format": "integer"}}})
    made = read_plan(path, plan, LINEARS)
    assert [name for name, scheme in made.layers.items() if scheme.has_integer_scales] == [OUT]
    path = write({"version": 1, "layers": {OUT: {"scale_format": "float", "weight_bits": 8}}})
    made = read_plan(path, uniform_plan("w4a8", INTEGER, LINEARS), LINEARS)
    assert made[OUT] == LayerScheme(8, 8, 64, "token")
    assert made[UP] == INTEGER


def test_integer_scales_count_their_multipliers_and_channels() -> None:
    # K = 64 in one group but for DOWN's four: 4 + 4/64 + 16/64 and 4 + 4/64 + 16/256
    plan = uniform_plan("w4a8", INTEGER, LINEARS)
    counts = {spec.name: spec.weight_count for spec in LINEARS}
    bits = sum(counts.values()) * (4 + 1 / 16) + sum(
        count / (16 if name == DOWN else 4) for name, count in counts.items()
    )
    assert plan.effective_weight_bits(LINEARS) == pytest.approx(bits / sum(counts.values()))


def test_plans_survive_copying_and_pickling(plan: QuantizationPlan) -> None:
    for twin in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert twin == plan
        assert list(twin.layers) == list(plan.layers)


def test_a_written_plan_reads_back_equal(plan: QuantizationPlan, tmp_path: Path) -> None:
    changed = QuantizationPlan("custom", dict(plan.layers) | {OUT: LayerScheme(8, 16, "channel")})
    changed.write(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json", plan, LINEARS) == changed
    assert QuantizationPlan.from_json(json.loads((tmp_path / "plan.json").read_text())) == changed


def test_what_a_plan_file_leaves_out_comes_from_the_default(
    plan: QuantizationPlan, write: Any
) -> None:
    path = write({"version": 1, "layers": {OUT: {"weight_bits": 8}, QUERY: {}}})
    merged = read_plan(path, plan, LINEARS)
    assert merged.bits == "w4a8"
    assert merged[OUT] == LayerScheme(8, 8, 64, 64)
    assert {name for name in merged.layers if merged[name] != plan[name]} == {OUT}


def test_an_empty_plan_file_is_the_default(plan: QuantizationPlan, write: Any) -> None:
    assert read_plan(write({"version": 1}), plan, LINEARS) == plan


REFUSED = [
    pytest.param("{", "is not a readable JSON plan", id="syntax"),
    pytest.param([], "a plan must be a JSON object, got list", id="list"),
    pytest.param({"version": 1, "layer": {}}, "unknown plan key 'layer'", id="unknown key"),
    pytest.param({"layers": {}}, "plan version must be 1, got None", id="no version"),
    pytest.param({"version": 2}, "plan version must be 1, got 2", id="future version"),
    pytest.param({"version": 1, "layers": []}, "'layers' must be a JSON object", id="layers list"),
    pytest.param({"version": 1, "bits": 4}, "'bits' a string", id="bits number"),
    pytest.param({"version": 1, "layers": {QUERY: 8}}, f"the scheme of {QUERY}", id="scheme"),
    pytest.param(
        {"version": 1, "layers": {QUERY: {"bits": 8}}},
        f"plan.json, layer {QUERY}: unknown scheme key 'bits'",
        id="unknown scheme key",
    ),
    pytest.param(
        {"version": 1, "layers": {QUERY: {"weight_bits": 5}}},
        f"plan.json, layer {QUERY}: weight bits must be one of",
        id="illegal bits",
    ),
    pytest.param(
        {"version": 1, "layers": {QUERY: {"weight_group": 128}}},
        f"must divide the 64 input channels of {QUERY}, got 128",
        id="group does not divide",
    ),
    pytest.param(
        {"version": 1, "layers": {ADALN: {"activation_bits": 8}}},
        "adaLN linears are quantized weight-only",
        id="adaln activations",
    ),
    pytest.param(
        {"version": 1, "layers": {"transformer_blocks.0.attn1.to_x": {}}},
        "no quantizable linear of this model; did you mean transformer_blocks.0.attn1.to_",
        id="near miss",
    ),
    pytest.param({"version": 1, "layers": {"#": {}}}, f"the first one is {OUT}", id="nothing near"),
]


@pytest.mark.parametrize(("value", "message"), REFUSED)
def test_other_plan_files_are_refused(
    value: object, message: str, plan: QuantizationPlan, write: Any
) -> None:
    with pytest.raises(InputError, match=message):
        read_plan(write(value), plan, LINEARS)


def test_a_missing_plan_file_is_named(plan: QuantizationPlan, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no plan file at .*nowhere\.json"):
        read_plan(tmp_path / "nowhere.json", plan, LINEARS)


FULL_REFUSED = [
    pytest.param(None, "a full plan must be a JSON object of version, bits", id="null"),
    pytest.param({"version": 1, "bits": "w4a8"}, "of version, bits and layers", id="no layers"),
    pytest.param({"version": 0, "bits": "", "layers": {}}, "must be 1, got 0", id="version 0"),
    pytest.param({"version": True, "bits": "", "layers": {}}, "must be 1, got True", id="bool"),
    pytest.param({"version": 1, "bits": "", "layers": []}, "'layers' must be", id="layers"),
    pytest.param(
        {"version": 1, "bits": "", "layers": {"x": {"weight_bits": 5}}},
        "the plan's layer x: weight bits must be",
        id="scheme",
    ),
]


@pytest.mark.parametrize(("value", "message"), FULL_REFUSED)
def test_full_plans_are_read_strictly(value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        QuantizationPlan.from_json(value)


def test_effective_bits_weigh_layers_by_their_size(plan: QuantizationPlan) -> None:
    # w4 g64 with float16 scales: 4 + 16/64 = 4.25 everywhere
    assert plan.effective_weight_bits(LINEARS) == 4.25
    mixed = QuantizationPlan("custom", dict(plan.layers) | {DOWN: LayerScheme(8, 8, "channel")})
    # 64·(384 + 64 + 64 + 256) weights at 4.25 bits and 256·64 at 8 + 16/256
    expected = (64 * 768 * 4.25 + 256 * 64 * 8.0625) / (64 * 768 + 256 * 64)
    assert mixed.effective_weight_bits(LINEARS) == pytest.approx(expected, rel=1e-15)


def test_effective_bits_do_not_depend_on_the_order_of_layers(plan: QuantizationPlan) -> None:
    mixed = QuantizationPlan("custom", dict(plan.layers) | {DOWN: LayerScheme(8, 8, "channel")})
    assert mixed.effective_weight_bits(LINEARS) == mixed.effective_weight_bits(LINEARS[::-1])
