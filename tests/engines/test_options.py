"""Options: what is refused, what overrides what."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdit.engines.options import ExportOptions, SchemeOptions, build_options, read_config
from qdit.errors import InputError


def test_the_activation_group_follows_the_weight_group() -> None:
    assert SchemeOptions(group_size=64).scheme().activation_group == 64
    assert SchemeOptions(group_size="channel").scheme().activation_group == "token"
    assert SchemeOptions(group_size=64, activation_group_size="token").scheme().weight_group == 64


def test_one_side_can_be_asymmetric() -> None:
    scheme = SchemeOptions(symmetric=False, activation_symmetric=True).scheme()
    assert (scheme.weight_symmetric, scheme.activation_symmetric) == (False, True)


def test_integer_scales_are_a_flag() -> None:
    scheme = SchemeOptions(scale_format="integer", activation_group_size="token").scheme()
    assert scheme.label == "w4 g128 int · a8 token"
    assert not SchemeOptions().scheme().has_integer_scales


def test_16_16_is_a_preset() -> None:
    scheme = SchemeOptions(bits="16/16").scheme()
    assert not scheme.quantizes_weights
    assert not scheme.quantizes_activations


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": "w5a8"}, r"bits must be one of w8a8, .*got 'w5a8'"),
        ({"colour": 1}, r"unknown option 'colour'; the options are .*bits"),
        ({"num_inference_steps": 0}, r"num-inference-steps: .*greater than or equal to 1, got 0"),
        ({"weights": "awq"}, r"weights: .*'gptq', 'mse' or 'nearest', got 'awq'"),
        ({"dtype": "bfloat16"}, r"dtype: .*'float32' or 'float16', got 'bfloat16'"),
        ({"guidance_scale": 0.5}, r"guidance-scale: .*got 0.5"),
        ({"fid_samples": -1}, r"fid-samples: .*got -1"),
        ({"scale_format": "int"}, r"scale-format: .*'float' or 'integer', got 'int'"),
        ({"reference": "/nowhere.npz"}, r"no such file: /nowhere.npz"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_values_get_one_line(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build_options(ExportOptions, values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"group_size": 48}, "weight group must be one of 32, .*channel, got 48"),
        ({"activation_group_size": 33}, "activation group must be one of 32, .*token, got 33"),
        (
            {"scale_format": "integer", "bits": "w6a8"},
            "integer scales need weights of 2, 3, 4 bits, got 6",
        ),
        (
            {"scale_format": "integer", "symmetric": False},
            "integer scales need symmetric weights, got asymmetric",
        ),
        # nothing that a flag says is ignored
        (
            {"scale_format": "integer", "group_size": "channel"},
            "integer scales are those of weight groups, got --bits w4a8 --group-size channel; use",
        ),
        (
            {"scale_format": "integer", "bits": "16/16"},
            "integer scales are those of weight groups, got --bits w16a16 .* leave --scale-format",
        ),
    ],
    ids=["weight", "activation", "6 bits", "asymmetric", "channel", "16 bits"],
)
def test_bad_groups_are_refused_by_the_scheme(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_options(SchemeOptions, values).scheme()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.toml", 'bits = "w8a8"\ngroup-size = 64\n'),
        ("c.json", '{"bits": "w8a8", "group_size": 64}'),
    ],
    ids=["toml", "json"],
)
def test_config_files_take_flag_names(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    options = build_options(ExportOptions, read_config(path))
    assert (options.bits, options.group_size) == ("w8a8", 64)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.yaml", "bits: w8a8", "must end in .toml or .json"),
        ("c.toml", "bits = ", "is not valid TOML"),
        ("c.json", "{", "is not valid JSON"),
        ("c.json", "[1]", "must hold one table of options, got list"),
    ],
    ids=["suffix", "toml", "json", "list"],
)
def test_bad_config_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_config(path)


def test_a_missing_config_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the config file"):
        read_config(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("given", "method"),
    [
        ({}, "none"),
        ({"budget": "effective-bits=4.25"}, "sensitivity"),
        ({"pareto": True}, "sensitivity"),
        ({"search": "none"}, "none"),
        ({"search": "evolutionary", "budget": "bytes=g64"}, "evolutionary"),
    ],
    ids=["nothing", "budget", "front", "none", "named"],
)
def test_a_budget_or_a_front_asks_for_a_search(given: dict[str, object], method: str) -> None:
    options = build_options(ExportOptions, given)
    assert options.search_method == method
    options.check_search()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"search_refine": 3}, "--search-refine is read by --search sensitivity or evolutionary"),
        ({"search": "none", "budget": "bytes=1e9"}, "--budget is read by .* got --search none"),
        ({"search": "sensitivity", "ray_address": "local"}, "read by --search evolutionary"),
        ({"search": "evolutionary", "pareto": True}, "--pareto is read by --search sensitivity"),
        ({"search": "sensitivity", "plan": Path("p.json")}, "either given or searched for"),
        ({"budget": "bitops=1e9", "latency_target": "torch"}, "a budget of latency-ms, got"),
        ({"search": "evolutionary", "refine_by": "fid"}, "--refine-by judges two plans or more"),
        ({"search": "sensitivity", "search_refine": 1, "refine_by": "fid"}, "got --search-refine"),
        ({"budget": "effective-bits"}, "a budget must be KIND=VALUE"),
    ],
)
def test_flags_that_nothing_would_read_are_refused(given: dict[str, object], message: str) -> None:
    options = build_options(ExportOptions, given)
    with pytest.raises(InputError, match=message):
        options.check_search()
