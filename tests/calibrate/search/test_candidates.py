"""Cached weights and the denoisers made of them, against weights and simulations made singly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qdit.calibrate.blockwise import quantize_model
from qdit.calibrate.model import DiffusionModel
from qdit.calibrate.quantizers import quantize_weight_nearest
from qdit.calibrate.schemes import LayerScheme
from qdit.calibrate.search import weight_cache as weight_cache_module
from qdit.calibrate.search.quantized_candidate import QuantizedCandidate
from qdit.calibrate.search.space import SearchSpace, search_space
from qdit.calibrate.search.switchable import CandidateDenoiser
from qdit.calibrate.search.weight_cache import WeightCache, build_weight_cache
from qdit.calibrate.simulate import install_quantized_linears
from qdit.calibrate.trajectories import CalibrationSet
from qdit.errors import InputError


@pytest.fixture(scope="module")
def calibration(tiny: Any) -> CalibrationSet:
    """Twelve random inputs."""
    family, denoiser = tiny.model.family, tiny.model.denoiser
    return CalibrationSet(*family.example_inputs(denoiser, 12, torch.Generator().manual_seed(1)))


@pytest.fixture(scope="module")
def gptq_cache(tiny: Any, calibration: CalibrationSet) -> WeightCache:
    return build_weight_cache(tiny.model, tiny.space, "gptq", calibration)


def run(model: DiffusionModel, denoiser: torch.nn.Module) -> torch.Tensor:
    inputs = model.family.example_inputs(model.denoiser, 3, torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model.family.forward(denoiser, *inputs)


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


def simulation(tiny: Any, plan: Any, weights: Any) -> torch.nn.Module:
    """The plan installed as an export installs it."""
    denoiser = copy.deepcopy(tiny.model.denoiser)
    install_quantized_linears(denoiser, plan.layers, weights)
    return denoiser


def test_a_candidate_is_the_simulation_of_its_plan_to_the_bit(
    tiny: Any, gptq_cache: WeightCache
) -> None:
    candidate = CandidateDenoiser(tiny.model, gptq_cache)
    full = run(tiny.model, tiny.model.denoiser)
    for plan in tiny.plans(3):
        weights = {n: gptq_cache.weights[n][s.weight_group] for n, s in plan.layers.items()}
        expected = run(tiny.model, simulation(tiny, plan, weights))
        candidate.apply(plan)
        assert torch.equal(run(tiny.model, candidate.module), expected)
        candidate.reset()
        assert torch.equal(run(tiny.model, candidate.module), full)
        candidate.take(plan, weights)
        assert torch.equal(run(tiny.model, candidate.module), expected)
        candidate.reset()
    assert not torch.equal(expected, full)


def test_a_candidate_shares_the_model_s_parameters_and_leaves_it_alone(tiny: Any) -> None:
    before = run(tiny.model, tiny.model.denoiser)
    candidate = CandidateDenoiser(tiny.model, tiny.cache)
    candidate.apply(tiny.plans(1)[0])
    own = {parameter.data_ptr() for parameter in tiny.model.denoiser.parameters()}
    assert {parameter.data_ptr() for parameter in candidate.module.parameters()} <= own
    assert torch.equal(run(tiny.model, tiny.model.denoiser), before)


def test_sixteen_bit_activations_are_left_alone(
    make_model: Callable[..., DiffusionModel],
) -> None:
    model = make_model(seed=3)
    for parameter in model.denoiser.parameters():
        parameter.data.normal_(std=0.1)
    space: SearchSpace = search_space(model.linears, LayerScheme(activation_bits=16), "w4a16")
    cache = build_weight_cache(model, space, "nearest", None)
    candidate = CandidateDenoiser(model, cache)
    plan = space.plan(space.uniform(32))
    candidate.apply(plan)
    expected = copy.deepcopy(model.denoiser)
    for name, scheme in plan.layers.items():
        weight = cache.weights[name][scheme.weight_group].dequantize()
        expected.get_submodule(name).weight.data.copy_(weight)
    assert torch.equal(run(model, candidate.module), run(model, expected))


def test_a_quantized_candidate_is_the_export_s_own_quantization(
    tiny: Any, calibration: CalibrationSet
) -> None:
    plan = tiny.plans(2)[1]
    before = run(tiny.model, tiny.model.denoiser)
    candidate = QuantizedCandidate(tiny.model, "gptq", calibration, batch_size=32)
    candidate.apply(plan)
    fresh = copy.copy(tiny.model)
    fresh.denoiser = copy.deepcopy(tiny.model.denoiser)
    quantize_model(fresh, plan, "gptq", calibration, batch_size=32)
    assert torch.equal(run(tiny.model, candidate.module), run(tiny.model, fresh.denoiser))
    candidate.reset()
    assert torch.equal(run(tiny.model, candidate.module), before)
    assert torch.equal(run(tiny.model, tiny.model.denoiser), before)
