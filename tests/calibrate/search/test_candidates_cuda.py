"""Fast candidates on a GPU: compiled, with products in float16, close to the exact ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qdit.calibrate.model import DiffusionModel
from qdit.calibrate.schemes import LayerScheme
from qdit.calibrate.search.space import search_space
from qdit.calibrate.search.switchable import CandidateDenoiser
from qdit.calibrate.search.weight_cache import build_weight_cache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_fast_candidate_follows_its_plan(make_model: Callable[..., DiffusionModel]) -> None:
    model = make_model()
    for parameter in model.denoiser.parameters():
        parameter.data.normal_(std=0.1)
    space = search_space(model.linears, LayerScheme(), "w4a8")
    cache = build_weight_cache(model, space, "nearest", None, device="cuda")
    exact = CandidateDenoiser(model, cache, device="cuda")
    fast = CandidateDenoiser(model, cache, device="cuda", fast=True)
    random = torch.Generator().manual_seed(1)
    inputs = [part.cuda() for part in model.family.example_inputs(model.denoiser, 4, random)]
    full = model.as_denoiser()(*inputs)
    for group in (32, "channel"):
        plan = space.plan(space.uniform(group))
        for candidate in (exact, fast):
            candidate.apply(plan)
        expected = model.as_denoiser(exact.module)(*inputs)
        found = model.as_denoiser(fast.module)(*inputs).float()
        quantization = (expected - full).norm()
        assert (found - expected).norm() < 0.2 * quantization
