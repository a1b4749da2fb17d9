"""Smoothing changes where large numbers are, and nothing else; ranges over the timesteps."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from qdit.calibrate.calibration_set import CalibrationSet
from qdit.calibrate.families import family_named
from qdit.calibrate.input_ranges import InputRange, collect_input_ranges
from qdit.calibrate.model import DiffusionModel, ModelSource
from qdit.calibrate.smoothing import smooth_model, smoothing_factors
from qdit.errors import InputError

CONFIG = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 3,
    "out_channels": 6,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
}


@pytest.fixture
def model() -> DiffusionModel:
    torch.manual_seed(0)
    family = family_named("dit")
    denoiser = family.build(CONFIG).double()
    for block in denoiser.transformer_blocks:  # trained adaLN is not small
        block.norm1.linear.weight.data.mul_(20)
    source = ModelSource("random", "small", "", 0)
    return DiffusionModel("small", source, family, denoiser, CONFIG, {})


def samples(model: DiffusionModel, count: int) -> CalibrationSet:
    generator = torch.Generator().manual_seed(1)
    return CalibrationSet(*model.family.example_inputs(model.denoiser, count, generator))


def ranges_of(model: DiffusionModel, count: int = 6) -> dict[str, InputRange]:
    return collect_input_ranges(
        model.family, model.denoiser, model.linears, samples(model, count), batch_size=4
    )


def outputs(model: DiffusionModel) -> torch.Tensor:
    with torch.inference_mode():
        return model.family.forward(model.denoiser, *samples(model, 3).tensors)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_the_smoothed_model_is_the_same_function(model: DiffusionModel, alpha: float) -> None:
    before = outputs(model)
    factors = smooth_model(model, ranges_of(model), alpha)
    # float64; the factors span 64 to either side, and a handful of roundings follow each other
    error = (outputs(model) - before).norm() / before.norm()
    assert error < 1e-13 * 64
    assert set(factors) == {
        f"transformer_blocks.{i}.{name}.input"
        for i in (0, 1)
        for name in ("attn1", "ff.net.0.proj")
    }


def test_channels_become_alike(model: DiffusionModel) -> None:
    before = ranges_of(model)
    smooth_model(model, before, alpha=1.0)
    after = ranges_of(model)
    for name in ("transformer_blocks.0.attn1.input", "transformer_blocks.1.ff.net.0.proj.input"):
        spread = before[name].channels.max() / before[name].channels.median()
        smoothed = after[name].channels.max() / after[name].channels.median()
        assert spread > 1.5
        # all channels get the largest magnitude 1, unless the factor was clamped
        assert smoothed < 1.01


def test_weights_take_over_what_activations_lose(model: DiffusionModel) -> None:
    weight = model.denoiser.transformer_blocks[0].attn1.to_q.weight.clone()
    factors = smooth_model(model, ranges_of(model), 0.5)["transformer_blocks.0.attn1.input"]
    moved = model.denoiser.transformer_blocks[0].attn1.to_q.weight
    torch.testing.assert_close(moved, weight * factors.double())


def test_factors_of_the_paper_s_equation() -> None:
    # 4^0.5 / 1^0.5 = 2; a dead channel and a dead column keep 1
    factors = smoothing_factors(
        torch.tensor([4.0, 0.0, 9.0, 2.0]), torch.tensor([1.0, 2.0, 0.0, 8.0]), 0.5
    )
    torch.testing.assert_close(factors, torch.tensor([2.0, 1.0, 1.0, 0.5]))


def test_a_strength_outside_0_to_1_is_refused(model: DiffusionModel) -> None:
    with pytest.raises(InputError, match=r"between 0 and 1, got 1.5"):
        smooth_model(model, {}, 1.5)


def test_missing_ranges_are_refused(model: DiffusionModel) -> None:
    with pytest.raises(InputError, match=r"needs the range of transformer_blocks.0.attn1.input"):
        smooth_model(model, {}, 0.5)


class TestRanges:
    def test_every_input_once_with_its_timesteps(self, model: DiffusionModel) -> None:
        found = ranges_of(model)
        assert list(found) == list(dict.fromkeys(s.input_name for s in model.linears))
        for entry in found.values():
            assert sorted(entry.timesteps) == sorted(set(samples(model, 6).timestep.tolist()))
            assert max(entry.timesteps.values()) == pytest.approx(entry.largest)

    def test_they_are_those_of_the_inputs(self, model: DiffusionModel) -> None:
        seen = []
        layer = model.denoiser.transformer_blocks[1].ff.net[2]
        handle = layer.register_forward_pre_hook(lambda _m, given: seen.append(given[0]))
        with torch.inference_mode():
            model.family.forward(model.denoiser, *samples(model, 6).tensors)
        handle.remove()
        found = ranges_of(model)["transformer_blocks.1.ff.net.2.input"]
        torch.testing.assert_close(
            found.channels, seen[0].abs().flatten(0, 1).amax(0).float(), rtol=1e-6, atol=0
        )
        assert int(found.counts.sum()) == seen[0].numel()

    def test_they_do_not_depend_on_the_batch_size(self, model: DiffusionModel) -> None:
        one, other = (
            collect_input_ranges(
                model.family, model.denoiser, model.linears, samples(model, 6), batch_size=size
            )
            for size in (1, 6)
        )
        for name, entry in one.items():
            # a product in another order may move a value across a bin's edge
            assert (entry.counts - other[name].counts).abs().sum() <= 4
            assert entry.largest == pytest.approx(other[name].largest, rel=1e-6)

    def test_nan_is_refused(self, model: DiffusionModel) -> None:
        model.denoiser.transformer_blocks[0].attn1.to_q.weight.data[0, 0] = float("nan")
        with pytest.raises(InputError, match="holds NaN or infinity"):
            ranges_of(model)

    def test_max_covers_the_largest_value(self) -> None:
        entry = InputRange("x", torch.zeros(2))
        entry.add(torch.tensor([[[1.0, -254.0], [3.0, 4.0]]]), torch.tensor([7]))
        assert entry.static_scale(method="max") == 2.0
        assert entry.clipped_share(2.0) == 0.0

    def test_mse_is_near_the_best_of_all_scales(self) -> None:
        """Against an exhaustive search on the values themselves, with real rounding."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 40000, 16, generator=generator)
        x[0, 0, 3] = 12.0  # an outlier that a static scale should give up
        entry = InputRange("x", torch.zeros(16))
        entry.add(x, torch.tensor([0]))
        values = x.double().numpy()

        def error(scale: float) -> float:
            return float(
                np.mean((np.clip(np.rint(values / scale), -128, 127) * scale - values) ** 2)
            )

        widest = entry.static_scale(method="max")
        best = min(error(c * widest) for c in np.linspace(0.02, 1, 400))
        assert error(entry.static_scale(method="mse")) <= 1.1 * best
        assert best < 0.9 * error(widest)

    def test_an_input_of_zeros_gets_the_smallest_scale(self) -> None:
        entry = InputRange("x", torch.zeros(4))
        entry.add(torch.zeros(2, 3, 4), torch.tensor([1, 2]))
        assert entry.static_scale() == 2.0**-24

    def test_an_unknown_method_is_refused(self) -> None:
        entry = copy.copy(InputRange("x", torch.ones(4)))
        with pytest.raises(InputError, match="chosen by mse or max, got 'kl'"):
            entry.static_scale(method="kl")  # type: ignore[arg-type]
