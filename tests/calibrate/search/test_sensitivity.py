"""Sensitivities against images sampled by models built for the purpose, and what is kept."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from qdit.calibrate.quantizers import fake_quantize_activation
from qdit.calibrate.sampling import SamplingSettings, sample_images
from qdit.calibrate.schemes import LayerScheme
from qdit.calibrate.search import sensitivity as sensitivity_module
from qdit.calibrate.search.local_errors import activation_shapes, weight_shapes
from qdit.calibrate.search.sensitivity import (
    ErrorTable,
    SensitivitySettings,
    measure_sensitivity,
)
from qdit.calibrate.search.space import SearchSpace, search_space
from qdit.calibrate.search.switchable import CandidateDenoiser
from qdit.calibrate.search.weight_cache import build_weight_cache
from qdit.calibrate.simulate import QuantizedInputLinear, QuantizedLinear, replace_linear
from qdit.calibrate.trajectories import CalibrationSet
from qdit.errors import InputError

SETTINGS = SensitivitySettings(SamplingSettings(2, 1.5, 11), images=2)
LINEAR = "transformer_blocks.1.ff.net.0.proj"


@pytest.fixture(scope="module")
def samples(tiny: Any) -> CalibrationSet:
    family, denoiser = tiny.model.family, tiny.model.denoiser
    return CalibrationSet(*family.example_inputs(denoiser, 5, torch.Generator().manual_seed(4)))


@pytest.fixture(scope="module")
def inputs(tiny: Any, samples: CalibrationSet) -> dict[str, dict[Any, float]]:
    return activation_shapes(tiny.model, tiny.space, samples, batch_size=2)


@pytest.fixture(scope="module")
def table(tiny: Any, inputs: dict[str, dict[Any, float]]) -> ErrorTable:
    candidate = CandidateDenoiser(tiny.model, tiny.cache)
    return measure_sensitivity(
        candidate, tiny.space, weight_shapes(tiny.cache), inputs, SETTINGS, batch_size=2
    )


def images(tiny: Any, denoiser: torch.nn.Module) -> torch.Tensor:
    return (
        sample_images(
            tiny.model,
            tiny.model.as_denoiser(denoiser),
            SETTINGS.sampling,
            range(2),
            batch_size=2,
            device="cpu",
        )
        .double()
        .clamp(-1, 1)
    )


def error_of(tiny: Any, name: str, replacement: torch.nn.Module) -> float:
    denoiser = copy.deepcopy(tiny.model.denoiser)
    replace_linear(denoiser, name, replacement)
    difference = images(tiny, denoiser) - images(tiny, tiny.model.denoiser)
    return float(difference.square().mean())


def test_a_weight_s_error_is_that_of_images_with_it_alone(tiny: Any, table: ErrorTable) -> None:
    linear = tiny.model.denoiser.get_submodule(LINEAR)
    group = tiny.space.weight_groups(LINEAR)[-1]  # 'channel': K is 64, the nearest to 128 is 64
    measured = min(
        tiny.space.weight_groups(LINEAR),
        key=lambda own: abs((10**9 if own == "channel" else own) - 128),
    )
    scheme = LayerScheme(weight_group=measured, activation_bits=16)
    replaced = QuantizedLinear(scheme, tiny.cache.weights[LINEAR][measured], linear.bias)
    expected = error_of(tiny, LINEAR, replaced)
    assert table.weight[LINEAR][measured] == pytest.approx(expected, rel=1e-9)
    shape = weight_shapes(tiny.cache)[LINEAR]
    assert table.weight[LINEAR][group] == pytest.approx(
        expected * shape[group] / shape[measured], rel=1e-9
    )


def test_activations_of_no_account_share_their_joint_error(
    tiny: Any, table: ErrorTable, inputs: dict[str, dict[Any, float]]
) -> None:
    denoiser = copy.deepcopy(tiny.model.denoiser)
    coarsest = {n: s[-1] for n, s in tiny.space.choices.items() if s[-1].quantizes_activations}
    for name, scheme in coarsest.items():
        linear: Any = denoiser.get_submodule(name)
        replace_linear(denoiser, name, QuantizedInputLinear(scheme, linear))
    together = (images(tiny, denoiser) - images(tiny, tiny.model.denoiser)).square().mean()
    assert sum(groups["token"] for groups in table.activation.values()) == pytest.approx(
        float(together), rel=1e-9
    )
    for name, groups in table.activation.items():
        for group, error in groups.items():
            share = inputs[name][group] / sum(own["token"] for own in inputs.values())
            assert error == pytest.approx(float(together) * share, rel=1e-9)


def test_activations_that_count_are_measured_singly(tiny: Any, samples: CalibrationSet) -> None:
    scheme = LayerScheme(weight_bits=8, activation_bits=4)
    space = search_space(tiny.model.linears, scheme, "w8a4")
    cache = build_weight_cache(tiny.model, space, "nearest", None)
    shapes = activation_shapes(tiny.model, space, samples)
    candidate = CandidateDenoiser(tiny.model, cache)
    found = measure_sensitivity(
        candidate, space, weight_shapes(cache), shapes, SETTINGS, batch_size=2
    )
    group = min(
        space.activation_groups(LINEAR),
        key=lambda own: abs((10**9 if own == "token" else own) - 128),
    )
    linear: Any = tiny.model.denoiser.get_submodule(LINEAR)
    own = LayerScheme(weight_bits=8, activation_bits=4, activation_group=group)
    expected = error_of(tiny, LINEAR, QuantizedInputLinear(own, linear))
    assert found.activation[LINEAR][group] == pytest.approx(expected, rel=1e-9)


def test_the_candidate_is_full_precision_before_and_afterwards(
    tiny: Any, table: ErrorTable, inputs: dict[str, dict[Any, float]]
) -> None:
    candidate = CandidateDenoiser(tiny.model, tiny.cache)
    candidate.apply(tiny.plans(1)[0])
    found = measure_sensitivity(
        candidate, tiny.space, weight_shapes(tiny.cache), inputs, SETTINGS, batch_size=2
    )
    assert found == table
    assert torch.equal(images(tiny, candidate.module), images(tiny, tiny.model.denoiser))


def test_a_choice_costs_both_of_its_sides(tiny: Any, table: ErrorTable) -> None:
    errors = table.choice_errors(tiny.space)
    for name, choices in tiny.space.choices.items():
        for scheme, error in zip(choices, errors[name], strict=True):
            weight = table.weight[name][scheme.weight_group]
            activation = 0.0
            if scheme.quantizes_activations:
                activation = table.activation[name][scheme.activation_group]
            assert error == weight + activation


def test_activation_shapes_equal_a_float64_restatement(
    tiny: Any, samples: CalibrationSet, inputs: dict[str, dict[Any, float]]
) -> None:
    linear: Any = tiny.model.denoiser.get_submodule(LINEAR)
    seen: list[torch.Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        tiny.model.family.forward(tiny.model.denoiser, *samples.tensors)
    hook.remove()
    x = torch.cat(seen).double()
    for group, value in inputs[LINEAR].items():
        scheme = LayerScheme(activation_group=group)
        error = functional.linear(fake_quantize_activation(x, scheme) - x, linear.weight.double())
        whole = functional.linear(x, linear.weight.double())
        expected = float(error.square().sum() / whole.square().sum())
        assert value == pytest.approx(expected, rel=1e-3)


def test_kept_measurements_are_not_made_again(
    tiny: Any,
    inputs: dict[str, dict[Any, float]],
    table: ErrorTable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    candidate = CandidateDenoiser(tiny.model, tiny.cache)

    def measure(settings: SensitivitySettings = SETTINGS) -> ErrorTable:
        return measure_sensitivity(
            candidate,
            tiny.space,
            weight_shapes(tiny.cache),
            inputs,
            settings,
            batch_size=2,
            folder=tmp_path,
        )

    assert measure() == table
    calls: list[int] = []
    real = sensitivity_module.sample_images

    def counting(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(sensitivity_module, "sample_images", counting)
    assert measure() == table
    assert not calls
    kept = json.loads((tmp_path / "sensitivity.json").read_text())
    removed = next(name for name in kept["errors"] if "ff.net.2|weight" in name)
    del kept["errors"][removed]
    (tmp_path / "sensitivity.json").write_text(json.dumps(kept))
    assert measure() == table
    assert len(calls) == 2  # full precision and the one that was missing
    calls.clear()
    (tmp_path / "sensitivity.json").write_text("{broken")
    assert measure() == table
    assert len(calls) == len(tiny.space.choices) + 2
    calls.clear()
    other = SensitivitySettings(SamplingSettings(2, 1.5, 12), images=2)
    assert measure(other) != table
    assert len(calls) == len(tiny.space.choices) + 2


@pytest.mark.parametrize(
    "changes", [{"activation_bits": 4}, {"activation_symmetric": False}], ids=["a4", "asymmetric"]
)
def test_kept_weights_serve_other_activations_and_kept_activations_do_not(
    changes: dict[str, Any],
    tiny: Any,
    samples: CalibrationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The cache, of weights only, is the same: `--bits w4a4` after `--bits w4a8`."""
    calls: list[int] = []
    real = sensitivity_module.sample_images

    def counting(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(sensitivity_module, "sample_images", counting)
    scheme = LayerScheme(**changes)
    space = search_space(tiny.model.linears, scheme, f"w4a{scheme.activation_bits}")
    cache = build_weight_cache(tiny.model, space, "nearest", None)
    assert cache.digest == tiny.cache.digest

    def measure(own: SearchSpace, folder: Path | None) -> ErrorTable:
        shapes = activation_shapes(tiny.model, own, samples)
        candidate = CandidateDenoiser(tiny.model, cache)
        calls.clear()
        return measure_sensitivity(
            candidate, own, weight_shapes(cache), shapes, SETTINGS, batch_size=2, folder=folder
        )

    first = measure(tiny.space, tmp_path)
    fresh = measure(space, None)
    without_folder = len(calls)
    assert measure(space, tmp_path) == fresh
    assert len(calls) == without_folder - len(tiny.space.choices)
    assert measure(tiny.space, tmp_path) == first
    assert not calls


def test_measurements_of_other_weights_are_not_taken_over(
    tiny: Any, table: ErrorTable, inputs: dict[str, dict[Any, float]], tmp_path: Path
) -> None:
    other = build_weight_cache(tiny.model, tiny.space, "mse", None)
    runs = [(tiny.cache, tmp_path), (other, tmp_path), (other, None)]
    _, kept, fresh = (
        measure_sensitivity(
            CandidateDenoiser(tiny.model, cache),
            tiny.space,
            weight_shapes(cache),
            inputs,
            SETTINGS,
            batch_size=2,
            folder=folder,
        )
        for cache, folder in runs
    )
    assert kept == fresh != table


@pytest.mark.parametrize(
    "content",
    ["", "[]", "null", '{"key": 1}', '{"key": KEY}', '{"key": KEY, "errors": {"a": "x"}}', "\xff"],
)
def test_an_unreadable_record_is_measured_again(
    content: str, tiny: Any, table: ErrorTable, inputs: dict[str, dict[Any, float]], tmp_path: Path
) -> None:
    def measure() -> ErrorTable:
        candidate = CandidateDenoiser(tiny.model, tiny.cache)
        return measure_sensitivity(
            candidate,
            tiny.space,
            weight_shapes(tiny.cache),
            inputs,
            SETTINGS,
            batch_size=2,
            folder=tmp_path,
        )

    record = tmp_path / "sensitivity.json"
    key = "no key"
    if "KEY" in content:
        measure()
        key = json.loads(record.read_text("utf-8"))["key"]
    record.write_bytes(content.replace("KEY", json.dumps(key)).encode("latin-1"))
    assert measure() == table


@pytest.mark.parametrize(
    "vae", [torch.nn.Identity(), None], ids=["latents as they are", "pixels clamped"]
)
def test_images_are_compared_as_they_will_be_seen(
    vae: torch.nn.Module | None, tiny: Any, inputs: dict[str, dict[Any, float]]
) -> None:
    latent = copy.copy(tiny.model)
    latent.vae = vae  # nothing is decoded here
    latent.scheduler_config = dict(tiny.model.scheduler_config) | {"clip_sample": False}
    candidate = CandidateDenoiser(latent, tiny.cache)
    found = measure_sensitivity(
        candidate, tiny.space, weight_shapes(tiny.cache), inputs, SETTINGS, batch_size=2
    )
    denoiser = copy.deepcopy(tiny.model.denoiser)
    linear: Any = denoiser.get_submodule(LINEAR)
    linear.weight.data.copy_(tiny.cache.weights[LINEAR][32].dequantize())
    changed, full = (
        sample_images(
            latent,
            latent.as_denoiser(own),
            SETTINGS.sampling,
            range(2),
            batch_size=2,
            device="cpu",
        ).double()
        for own in (denoiser, tiny.model.denoiser)
    )
    assert full.abs().max() > 1
    if vae is None:
        changed, full = changed.clamp(-1, 1), full.clamp(-1, 1)
    expected = float((changed - full).square().mean())
    assert found.weight[LINEAR][32] == pytest.approx(expected, rel=1e-9)


def test_no_images_are_refused() -> None:
    with pytest.raises(InputError, match="at least 1 image, got 0"):
        SensitivitySettings(SamplingSettings(2, 1.0, 0), images=0)
