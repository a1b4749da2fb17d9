"""Fitness from images: against FID and PSNR worked out anew, and what travels in a payload."""

from __future__ import annotations

import math
import pickle  # noqa: TID251  what Ray and spawned processes do with a payload
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from qdit.calibrate.plan import QuantizationPlan
from qdit.calibrate.sampling import SamplingSettings, sample_images
from qdit.calibrate.schemes import LayerScheme
from qdit.calibrate.search.fitness import Fitness, FitnessSettings, paper_settings
from qdit.calibrate.search.payload import make_payload
from qdit.calibrate.search.space import search_space
from qdit.calibrate.search.weight_cache import build_weight_cache
from qdit.calibrate.simulate import install_quantized_linears
from qdit.errors import InputError


def images_of(model: Any, settings: FitnessSettings) -> torch.Tensor:
    """All images in one batch, pixels as they are."""
    indices = range(settings.samples)
    images = sample_images(
        model, model.as_denoiser(), settings.sampling, indices, batch_size=99, device="cpu"
    )
    return images.clamp(-1, 1)


def test_fid_and_psnr_are_those_of_the_quantized_models_images(tiny: Any, make_model: Any) -> None:
    plan = tiny.plans(3)[2]
    found = tiny.payload.build("cpu")(plan)

    full = images_of(tiny.model, tiny.payload.settings)
    quantized = make_model()
    quantized.denoiser.load_state_dict(tiny.model.denoiser.state_dict())
    weights = {
        s.name: tiny.cache.weights[s.name][plan[s.name].weight_group] for s in tiny.model.linears
    }
    install_quantized_linears(quantized.denoiser, plan.layers, weights)
    images = images_of(quantized, tiny.payload.settings)

    rows = images.double().unflatten(2, (2, 4)).unflatten(4, (2, 4)).mean((3, 5)).flatten(1).numpy()
    sigma = np.cov(rows, rowvar=False)
    root = sqrtm(sigma @ tiny.reference.sigma).real
    shift = ((rows.mean(0) - tiny.reference.mu) ** 2).sum()
    fid = shift + np.trace(sigma + tiny.reference.sigma - 2 * root)
    error = (images - full).double().square().mean().item()
    # float32 means of 16 pixels against float64 ones; sqrtm of a rank-5 matrix is good to 1e-5
    assert found.fid == pytest.approx(fid, rel=1e-4)
    assert found.psnr_db == pytest.approx(10 * math.log10(4 / error), rel=1e-4)


def test_the_same_plan_gives_the_same_fitness_whatever_came_before(tiny: Any) -> None:
    evaluator = tiny.payload.build("cpu")
    plans = tiny.plans(3)
    forwards = [evaluator(plan) for plan in plans]
    assert [evaluator(plan) for plan in reversed(plans)] == forwards[::-1]
    assert evaluator.full_precision is not None
    assert evaluator.full_precision.psnr_db is None


def test_an_unquantized_plan_has_the_full_precision_fid_and_no_finite_psnr(tiny: Any) -> None:
    evaluator = tiny.payload.build("cpu")
    untouched = LayerScheme(weight_bits=16, activation_bits=16)
    plan = QuantizationPlan("w16a16", {spec.name: untouched for spec in tiny.model.linears})
    assert evaluator(plan) == evaluator.full_precision
    assert evaluator(plan).psnr_db is None


def test_psnr_is_left_out_when_not_asked_for(tiny: Any) -> None:
    plan = tiny.plans(1)[0]
    settings = replace(tiny.payload.settings, paired_psnr=False)
    found = replace(tiny.payload, settings=settings).build("cpu")(plan)
    assert found.psnr_db is None
    assert found.fid == tiny.payload.build("cpu")(plan).fid


def test_images_that_are_not_finite_are_the_worst_fitness(tiny: Any) -> None:
    name = tiny.space.linears[0].name
    plan = tiny.plans(1)[0]
    group = plan[name].weight_group
    broken = tiny.payload.weights[name][group]
    scale = np.full_like(broken.tensors["scale"], np.nan)
    broken = replace(broken, tensors={**broken.tensors, "scale": scale})
    groups = {**tiny.payload.weights[name], group: broken}
    payload = replace(tiny.payload, weights={**tiny.payload.weights, name: groups})
    assert payload.build("cpu")(plan) == Fitness(math.inf, None, 0.0)


def test_a_broken_full_precision_model_is_no_candidates_fault(tiny: Any) -> None:
    parameters = dict(tiny.payload.model.parameters)
    parameters["proj_out_2.bias"] = np.full_like(parameters["proj_out_2.bias"], np.nan)
    model = replace(tiny.payload.model, parameters=parameters)
    with pytest.raises(InputError, match="full-precision images of tiny must be finite"):
        replace(tiny.payload, model=model).build("cpu")


class TestPayload:
    def test_a_pickled_payload_is_whole(self, tiny: Any) -> None:
        plan = tiny.plans(1)[0]
        again = pickle.loads(pickle.dumps(tiny.payload))
        assert again.key == tiny.payload.key
        assert again.build("cpu")(plan) == tiny.payload.build("cpu")(plan)

    def test_integer_scales_travel_with_their_weights(self, tiny: Any) -> None:
        scheme = LayerScheme(scale_format="integer")
        space = search_space(tiny.model.linears, scheme, "w4a8")
        cache = build_weight_cache(tiny.model, space, "nearest", None)
        payload = make_payload(
            tiny.model,
            cache,
            tiny.payload.settings,
            features=tiny.features,
            reference=tiny.reference,
            threads=1,
        )
        parts = {
            (group, name)
            for groups in payload.weights.values()
            for group, weight in groups.items()
            for name in weight.tensors
        }
        assert (32, "multiplier") in parts
        assert ("channel", "multiplier") not in parts  # these have float scales
        assert payload.key != tiny.payload.key
        plan = space.plan(space.uniform(32))
        again = pickle.loads(pickle.dumps(payload)).build("cpu")(plan)
        assert again == payload.build("cpu")(plan)
        floats = tiny.payload.build("cpu")(tiny.space.plan(tiny.space.uniform(32)))
        assert again.psnr_db != floats.psnr_db

    def test_tied_parameters_travel_once(self, tiny: Any) -> None:
        parameters = tiny.payload.model.parameters
        ours = {name for name in parameters if "norm1.emb" in name}
        assert len({id(parameters[name]) for name in ours}) == len(ours) / 2
        stored = sum(p.numel() * 4 for p in tiny.model.denoiser.parameters())
        arrays = {id(array): array.nbytes for array in parameters.values()}
        assert sum(arrays.values()) == stored

    def test_it_needs_no_file_of_the_driver(self, tiny: Any, tmp_path: Any) -> None:
        features = tmp_path / "features.onnx"
        features.write_bytes(tiny.features.read_bytes())
        payload = make_payload(
            tiny.model,
            tiny.cache,
            tiny.payload.settings,
            features=features,
            reference=tiny.reference,
            threads=1,
        )
        features.unlink()
        assert payload.key == tiny.payload.key
        payload.build("cpu")

    @pytest.mark.parametrize(
        "changes",
        [
            {"cache_digest": "other"},
            {"features_file": b"other"},
            {"mu": np.ones(12)},
            {"settings": FitnessSettings(SamplingSettings(2, 1.0, 8), samples=6, batch_size=4)},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_another_input_is_another_key(self, tiny: Any, changes: dict[str, Any]) -> None:
        assert replace(tiny.payload, **changes).key != tiny.payload.key

    def test_threads_do_not_change_the_key(self, tiny: Any) -> None:
        assert replace(tiny.payload, threads=2).key == tiny.payload.key


def test_the_papers_settings() -> None:
    settings = paper_settings()
    assert settings.samples == 800
    assert settings.sampling == SamplingSettings(50, 1.0, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"samples": 1}, "at least 2 images a candidate, got 1"), ({"batch_size": 0}, "got 0")],
    ids=["samples", "batch"],
)
def test_illegal_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FitnessSettings(SamplingSettings(2, 1.0, 0), **changes)
