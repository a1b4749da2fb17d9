"""Weights quantized once for every group size, against each quantized singly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from qdit.calibrate.blockwise import quantize_model
from qdit.calibrate.gptq import gptq
from qdit.calibrate.quantizers import quantize_weight_mse, quantize_weight_nearest
from qdit.calibrate.schemes import LayerScheme
from qdit.calibrate.search import weight_cache as weight_cache_module
from qdit.calibrate.search.space import SearchSpace, search_space
from qdit.calibrate.search.weight_cache import WeightCache, build_weight_cache
from qdit.calibrate.trajectories import CalibrationSet
from qdit.errors import InputError


def assert_same_weights(one: WeightCache, other: WeightCache) -> None:
    assert list(one.weights) == list(other.weights)
    assert one.errors == other.errors
    for name, groups in one.weights.items():
        assert list(groups) == list(other.weights[name])
        for group, weight in groups.items():
            again = other.weights[name][group]
            assert weight.tensors().keys() == again.tensors().keys()
            for part, tensor in weight.tensors().items():
                assert torch.equal(tensor, again.tensors()[part]), (name, part)


@pytest.fixture(scope="module")
def inputs(tiny: Any, calibration: CalibrationSet) -> dict[str, Tensor]:
    """Inputs [rows, K] of every linear of the full-precision model, seen by hooks."""
    seen: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        return lambda _, given: seen.__setitem__(name, given[0].flatten(0, -2))

    handles = [
        tiny.model.denoiser.get_submodule(name).register_forward_pre_hook(record(name))
        for name in tiny.space.choices
    ]
    with torch.no_grad():
        tiny.model.family.forward(tiny.model.denoiser, *calibration.tensors)
    for handle in handles:
        handle.remove()
    return seen


def test_every_linear_has_every_group_of_its_space(tiny: Any, gptq_cache: WeightCache) -> None:
    for name in tiny.space.choices:
        assert tuple(gptq_cache.weights[name]) == tiny.space.weight_groups(name)
        for group, weight in gptq_cache.weights[name].items():
            k = weight.values.shape[1]
            assert weight.group_size == (k if group == "channel" else group)
            output = gptq_cache.errors[name][group].output
            assert output is not None
            assert 0 < output < 1


def test_finer_groups_err_less_on_the_outputs(tiny: Any, gptq_cache: WeightCache) -> None:
    finest = coarsest = 0.0
    for errors in gptq_cache.errors.values():
        values = [error.output or 0.0 for error in errors.values()]
        finest, coarsest = finest + values[0], coarsest + values[-1]
    assert finest < coarsest


@pytest.mark.parametrize("group", [32, 64])
def test_the_first_block_equals_an_export_s_gptq(
    group: int, tiny: Any, calibration: CalibrationSet, gptq_cache: WeightCache
) -> None:
    """Nothing before the first block is quantized, and weight-only plans leave inputs alone, so
    its Hessians are the export's own."""
    fresh = copy.copy(tiny.model)
    fresh.denoiser = copy.deepcopy(tiny.model.denoiser)
    genome = [
        next(
            place
            for place, choice in enumerate(tiny.space.choices[spec.name])
            if choice.weight_group_size(spec.in_features) == group
        )
        for spec in tiny.space.linears
    ]
    plan = tiny.space.plan(genome)
    plan = type(plan)(plan.bits, {name: own.weight_only() for name, own in plan.layers.items()})
    result = quantize_model(fresh, plan, "gptq", calibration)
    for spec in tiny.space.linears:
        if spec.block == 0:
            ours = gptq_cache.weights[spec.name][plan[spec.name].weight_group]
            theirs = result.weights[spec.name]
            assert torch.equal(ours.values, theirs.values), spec.name
            assert torch.equal(ours.scale, theirs.scale)


def test_nearest_needs_no_calibration_and_is_round_to_nearest(tiny: Any) -> None:
    for name, groups in tiny.cache.weights.items():
        weight = tiny.model.denoiser.get_submodule(name).weight
        for group, quantized in groups.items():
            expected = quantize_weight_nearest(weight, LayerScheme(weight_group=group))
            assert torch.equal(quantized.values, expected.values)
            assert tiny.cache.errors[name][group].output is None


def test_gptq_without_a_calibration_set_is_refused(tiny: Any) -> None:
    with pytest.raises(InputError, match="gptq needs a calibration set, got none"):
        build_weight_cache(tiny.model, tiny.space, "gptq", None)


def test_finished_blocks_are_taken_over_by_the_same_search_only(
    tiny: Any, calibration: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved: list[int] = []
    real = weight_cache_module.solve_groups

    def counting(*arguments: Any) -> Any:
        solved.append(1)
        return real(*arguments)

    monkeypatch.setattr(weight_cache_module, "solve_groups", counting)
    first = build_weight_cache(tiny.model, tiny.space, "gptq", calibration, folder=tmp_path)
    count = len(solved)
    assert count > 0
    again = build_weight_cache(tiny.model, tiny.space, "gptq", calibration, folder=tmp_path)
    assert len(solved) == count
    assert again.digest == first.digest
    for name, groups in first.weights.items():
        for group, weight in groups.items():
            assert torch.equal(weight.values, again.weights[name][group].values)
    (tmp_path / "block-0001.safetensors").unlink()  # as a kill in the second block leaves it
    build_weight_cache(tiny.model, tiny.space, "gptq", calibration, folder=tmp_path)
    assert count < len(solved) < 2 * count
    other = CalibrationSet(*(part[:6] for part in calibration.tensors))
    solved.clear()
    build_weight_cache(tiny.model, tiny.space, "gptq", other, folder=tmp_path)
    assert len(solved) == count


@pytest.mark.parametrize("block", [0, 1])
def test_every_hessian_is_of_the_full_precision_model_s_inputs(
    block: int, tiny: Any, gptq_cache: WeightCache, inputs: dict[str, Tensor]
) -> None:
    """No weight of an earlier block and no activation group may decide a cached weight."""
    for spec in tiny.space.linears:
        if spec.block != block:
            continue
        x = inputs[spec.name]
        weight = tiny.model.denoiser.get_submodule(spec.name).weight
        for group, ours in gptq_cache.weights[spec.name].items():
            hessian = 2 * x.t() @ x / len(x)
            alone = gptq(weight, hessian, LayerScheme(weight_group=group))
            assert torch.equal(ours.scale, alone.scale), spec.name
            # a sum in another order may flip a rounding here and there
            assert (ours.values != alone.values).float().mean() < 1e-3, spec.name


@pytest.mark.parametrize("method", ["gptq", "mse", "nearest"])
def test_errors_are_those_of_weights_and_outputs(
    method: Literal["gptq", "mse", "nearest"],
    tiny: Any,
    calibration: CalibrationSet,
    inputs: dict[str, Tensor],
) -> None:
    cache = build_weight_cache(tiny.model, tiny.space, method, calibration)
    for name, groups in cache.weights.items():
        weight = tiny.model.denoiser.get_submodule(name).weight.double()
        x = inputs[name].double()
        for group, quantized in groups.items():
            difference = weight - quantized.dequantize(torch.float64)
            found = cache.errors[name][group]
            assert found.weight == pytest.approx(float(difference.norm() / weight.norm()), rel=1e-5)
            whole = (x @ weight.t()).norm()
            expected = float((x @ difference.t()).norm() / whole)
            assert found.output == pytest.approx(expected, rel=1e-3)


def test_mse_clips_each_group_size_by_itself(tiny: Any) -> None:
    cache = build_weight_cache(tiny.model, tiny.space, "mse", None)
    for name, groups in cache.weights.items():
        weight = tiny.model.denoiser.get_submodule(name).weight
        for group, quantized in groups.items():
            expected = quantize_weight_mse(weight, LayerScheme(weight_group=group))
            assert torch.equal(quantized.values, expected.values), name
            assert torch.equal(quantized.scale, expected.scale), name


def test_the_model_is_left_as_it_was(tiny: Any, calibration: CalibrationSet) -> None:
    denoiser = tiny.model.denoiser
    modules = dict(denoiser.named_modules())
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    build_weight_cache(tiny.model, tiny.space, "gptq", calibration)
    assert dict(denoiser.named_modules()) == modules
    assert not any(module._forward_pre_hooks for module in modules.values())
    for name, value in denoiser.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(
    tiny: Any, calibration: CalibrationSet, gptq_cache: WeightCache, tmp_path: Path
) -> None:
    build_weight_cache(tiny.model, tiny.space, "gptq", calibration, folder=tmp_path)
    (tmp_path / "block-0001.safetensors").unlink()
    again = build_weight_cache(tiny.model, tiny.space, "gptq", calibration, folder=tmp_path)
    assert_same_weights(again, gptq_cache)


KINDS = pytest.mark.parametrize(
    "scheme",
    [
        LayerScheme(),
        LayerScheme(weight_symmetric=False),
        LayerScheme(scale_format="integer"),
    ],
    ids=["symmetric", "asymmetric", "integer scales"],
)


@KINDS
def test_kept_weights_come_back_whole(scheme: LayerScheme, tiny: Any, tmp_path: Path) -> None:
    space = search_space(tiny.model.linears, scheme, "w4a8")
    first = build_weight_cache(tiny.model, space, "nearest", None, folder=tmp_path)
    again = build_weight_cache(tiny.model, space, "nearest", None, folder=tmp_path)
    assert_same_weights(again, first)
    kept = next(iter(again.weights["transformer_blocks.0.ff.net.2"].values()))
    assert (kept.zero_point is None) == scheme.weight_symmetric
    assert (kept.multiplier is None) == (not scheme.has_integer_scales)


def test_weights_of_another_kind_are_not_taken_over(tiny: Any, tmp_path: Path) -> None:
    """Each run finds the leftovers of the one before."""
    finest = search_space(tiny.model.linears, LayerScheme(), "w4a8", groups=[32])
    coarse = search_space(tiny.model.linears, LayerScheme(), "w4a8", groups=["channel"])
    three = search_space(tiny.model.linears, LayerScheme(weight_bits=3), "w3a8")
    integer = search_space(tiny.model.linears, LayerScheme(scale_format="integer"), "w4a8")
    digests = set()
    runs: list[tuple[SearchSpace, Literal["mse", "nearest"]]] = [
        (tiny.space, "nearest"),
        (tiny.space, "mse"),
        (finest, "mse"),
        (three, "mse"),
        (integer, "mse"),
        (coarse, "mse"),
    ]
    for space, method in runs:
        found = build_weight_cache(tiny.model, space, method, None, folder=tmp_path)
        assert_same_weights(found, build_weight_cache(tiny.model, space, method, None))
        digests.add(found.digest)
    assert len(digests) == len(runs)


@pytest.mark.parametrize("method", ["gptq", "nearest"])
def test_integer_scales_are_those_of_each_group_size_by_itself(
    method: Literal["gptq", "nearest"],
    tiny: Any,
    calibration: CalibrationSet,
    inputs: dict[str, Tensor],
) -> None:
    """Stacked with the 'channel' choice, which has float scales."""
    space = search_space(tiny.model.linears, LayerScheme(scale_format="integer"), "w4a8")
    cache = build_weight_cache(tiny.model, space, method, calibration)
    for name, groups in cache.weights.items():
        weight, x = tiny.model.denoiser.get_submodule(name).weight, inputs[name]
        for group, ours in groups.items():
            scheme = LayerScheme(weight_group=group, scale_format="integer")
            if method == "gptq":
                alone = gptq(weight, 2 * x.t() @ x / len(x), scheme)
            else:
                alone = quantize_weight_nearest(weight, scheme)
            assert (ours.multiplier is None) == (group == "channel")
            # a Hessian summed in another order may turn one choice between two near-equal errors
            assert (ours.scale != alone.scale).float().mean() < 0.01, (name, group)


def test_linears_left_at_16_bits_have_no_weights(tiny: Any) -> None:
    left = "transformer_blocks.0.attn1.to_k"
    full = LayerScheme(weight_bits=16, activation_bits=16)
    choices = dict(tiny.space.choices) | {left: (full,)}
    cache = build_weight_cache(
        tiny.model, SearchSpace(tiny.space.linears, choices, "w4a8"), "nearest", None
    )
    assert set(cache.weights) == set(choices) - {left}
    assert set(cache.errors) == set(cache.weights)
