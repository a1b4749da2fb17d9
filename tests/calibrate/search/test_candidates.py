"""Denoisers made of cached weights, against simulations made singly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qdit.calibrate.blockwise import quantize_model
from qdit.calibrate.model import DiffusionModel
from qdit.calibrate.quantizers import quantize_weight_nearest
from qdit.calibrate.schemes import LayerScheme, ScaleDtype
from qdit.calibrate.search.quantized_candidate import QuantizedCandidate
from qdit.calibrate.search.space import SearchSpace, search_space
from qdit.calibrate.search.switchable import CandidateDenoiser, SwitchableLinear
from qdit.calibrate.search.weight_cache import WeightCache, build_weight_cache
from qdit.calibrate.simulate import QuantizedLinear, install_quantized_linears
from qdit.calibrate.trajectories import CalibrationSet


def run(model: DiffusionModel, denoiser: torch.nn.Module) -> torch.Tensor:
    inputs = model.family.example_inputs(model.denoiser, 3, torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model.family.forward(denoiser, *inputs)


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


def test_a_quantized_candidate_starts_every_plan_from_full_precision(
    tiny: Any, calibration: CalibrationSet
) -> None:
    first, second = tiny.plans(2)
    once, twice = (QuantizedCandidate(tiny.model, "nearest", calibration) for _ in range(2))
    twice.apply(first)
    for candidate in (once, twice):
        candidate.apply(second)
    assert torch.equal(run(tiny.model, twice.module), run(tiny.model, once.module))


def test_asymmetric_weights_and_activations_are_simulated_to_the_bit(tiny: Any) -> None:
    scheme = LayerScheme(weight_symmetric=False, activation_symmetric=False)
    space = search_space(tiny.model.linears, scheme, "w4a8")
    cache = build_weight_cache(tiny.model, space, "nearest", None)
    candidate = CandidateDenoiser(tiny.model, cache)
    for group in (32, "channel"):
        plan = space.plan(space.uniform(group))
        weights = {n: cache.weights[n][s.weight_group] for n, s in plan.layers.items()}
        candidate.apply(plan)
        expected = run(tiny.model, simulation(tiny, plan, weights))
        assert torch.equal(run(tiny.model, candidate.module), expected)


def test_a_linear_left_at_16_bits_stays_as_it_is(tiny: Any) -> None:
    left = "transformer_blocks.0.attn1.to_k"
    full = LayerScheme(weight_bits=16, activation_bits=16)
    choices = dict(tiny.space.choices) | {left: (full,)}
    space = SearchSpace(tiny.space.linears, choices, "w4a8")
    cache = build_weight_cache(tiny.model, space, "nearest", None)
    candidate = CandidateDenoiser(tiny.model, cache)
    plan = space.plan([0] * len(space.sizes))
    weights = {n: cache.weights[n][plan[n].weight_group] for n in cache.weights}
    expected = run(tiny.model, simulation(tiny, plan, weights))
    candidate.apply(plan)
    assert torch.equal(run(tiny.model, candidate.module), expected)
    candidate.reset()
    candidate.take(plan, weights)
    assert torch.equal(run(tiny.model, candidate.module), expected)


@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_are_rounded_to_the_denoiser_s_dtype_once(
    dtype: torch.dtype, scale_dtype: ScaleDtype, tiny: Any
) -> None:
    linear = tiny.model.denoiser.get_submodule("transformer_blocks.1.ff.net.2")
    scheme = LayerScheme(weight_symmetric=False, weight_group=32, scale_dtype=scale_dtype)
    quantized = quantize_weight_nearest(linear.weight, scheme)
    own = copy.deepcopy(linear).to(dtype)
    switchable = SwitchableLinear(own, {32: quantized})
    switchable.use(32, scheme)
    simulated = QuantizedLinear(scheme, quantized, own.bias, dtype)
    x = torch.randn(7, 256, generator=torch.Generator().manual_seed(5)).to(dtype)
    assert torch.equal(switchable(x), simulated(x))
    assert torch.equal(switchable._weight, simulated.weight)
