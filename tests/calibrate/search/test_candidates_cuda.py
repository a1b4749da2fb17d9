"""Candidates on a GPU: captured as graphs, and the fast ones compiled with products in float16."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qdit.calibrate.graphed import GraphedForward
from qdit.calibrate.model import DiffusionModel
from qdit.calibrate.schemes import LayerScheme
from qdit.calibrate.search.space import search_space
from qdit.calibrate.search.switchable import CandidateDenoiser
from qdit.calibrate.search.weight_cache import build_weight_cache
from qdit.calibrate.simulate import install_quantized_linears

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def model(make_model: Callable[..., DiffusionModel]) -> DiffusionModel:
    made = make_model()
    for parameter in made.denoiser.parameters():
        parameter.data.normal_(std=0.1)
    return made


def inputs_of(model: DiffusionModel, batch: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(batch)
    return [p.cuda() for p in model.family.example_inputs(model.denoiser, batch, random)]


def test_a_captured_candidate_is_the_eager_simulation_to_the_bit(model: DiffusionModel) -> None:
    space = search_space(model.linears, LayerScheme(), "w4a8")
    cache = build_weight_cache(model, space, "nearest", None, device="cuda")
    candidate = CandidateDenoiser(model, cache, device="cuda")
    full = {batch: model.as_denoiser()(*inputs_of(model, batch)) for batch in (4, 3)}
    run = model.as_denoiser(candidate.module)
    for group in (32, "channel", 32):  # back again, with other graphs in between
        plan = space.plan(space.uniform(group))
        simulation = copy.deepcopy(model.denoiser)
        weights = {n: cache.weights[n][s.weight_group] for n, s in plan.layers.items()}
        install_quantized_linears(simulation, plan.layers, weights)
        candidate.apply(plan)
        for batch in (4, 3, 4):
            expected = model.as_denoiser(simulation)(*inputs_of(model, batch))
            assert torch.equal(run(*inputs_of(model, batch)), expected)
            assert not torch.equal(expected, full[batch])
        candidate.reset()
        for batch in (4, 3):
            assert torch.equal(run(*inputs_of(model, batch)), full[batch])


def test_another_weight_needs_no_other_graph(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured: list[Any] = []
    capture = GraphedForward._capture
    monkeypatch.setattr(
        GraphedForward, "_capture", lambda own, given: captured.append(1) or capture(own, given)
    )
    space = search_space(model.linears, LayerScheme(), "w4a8")
    cache = build_weight_cache(model, space, "nearest", None, device="cuda")
    candidate = CandidateDenoiser(model, cache, device="cuda")
    run = model.as_denoiser(candidate.module)
    outputs = [run(*inputs_of(model, 2))]
    for name in list(cache.weights)[:3]:
        candidate.linears[name].use(32, None)
        outputs.append(run(*inputs_of(model, 2)))
        candidate.linears[name].use(None, None)
    assert len(captured) == 1
    assert len({tuple(output.flatten().tolist()) for output in outputs}) == len(outputs)


def test_a_fast_candidate_follows_its_plan(model: DiffusionModel) -> None:
    space = search_space(model.linears, LayerScheme(), "w4a8")
    cache = build_weight_cache(model, space, "nearest", None, device="cuda")
    exact = CandidateDenoiser(model, cache, device="cuda")
    fast = CandidateDenoiser(model, cache, device="cuda", fast=True)
    inputs = inputs_of(model, 4)
    full = model.as_denoiser()(*inputs)
    for group in (32, "channel"):
        plan = space.plan(space.uniform(group))
        for candidate in (exact, fast):
            candidate.apply(plan)
        expected = model.as_denoiser(exact.module)(*inputs)
        found = model.as_denoiser(fast.module)(*inputs).float()
        quantization = (expected - full).norm()
        assert (found - expected).norm() < 0.2 * quantization
