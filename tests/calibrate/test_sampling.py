"""Sampling against diffusers' own pipeline, and against a denoiser whose answer is known."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from diffusers.pipelines.dit import pipeline_dit
from torch import Tensor

from qdit.calibrate.families import family_named
from qdit.calibrate.model import DiffusionModel, ModelSource
from qdit.calibrate.sampling import (
    SampledModel,
    SamplingSettings,
    Trajectory,
    decode_images,
    initial_noise,
    labels_for,
    sample_images,
)
from qdit.calibrate.schedulers import make_scheduler
from qdit.calibrate.sources.schedulers import default_scheduler_config
from qdit.errors import InputError

FAMILY = family_named("dit")
CONFIG: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,  # DiTPipeline's null label is the number 1000
}
SHAPE = (4, 8, 8)
GOLDEN_NOISE = [-0.360827, -0.208633, -0.120694]


@cache
def tiny_vae() -> Any:
    torch.manual_seed(1)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.18215,
    )
    return vae.eval().requires_grad_(False)


def make_model(vae: bool = False, **changes: Any) -> DiffusionModel:
    torch.manual_seed(0)
    config = CONFIG | changes
    denoiser = FAMILY.build(config)
    return DiffusionModel(
        name="tiny",
        source=ModelSource("random", "tiny", ""),
        family=FAMILY,
        denoiser=denoiser,
        config=config,
        scheduler_config=default_scheduler_config(),
        vae=tiny_vae() if vae else None,
    )


MODEL = make_model()


def draw(denoiser: Any, settings: SamplingSettings, count: int = 5, **options: Any) -> Tensor:
    options = {"batch_size": 2, "device": "cpu"} | options
    return sample_images(MODEL, denoiser, settings, range(count), **options)


class TestAgainstThePipeline:
    @pytest.mark.parametrize("guidance", [1.0, 1.5, 4.0])
    @pytest.mark.parametrize("out_channels", [4, 8], ids=["fixed sigma", "learned sigma"])
    def test_same_noise_gives_the_same_images(
        self, monkeypatch: pytest.MonkeyPatch, guidance: float, out_channels: int
    ) -> None:
        model = make_model(vae=True, out_channels=out_channels)
        noise = initial_noise(range(3), SHAPE, seed=5)
        monkeypatch.setattr(pipeline_dit, "randn_tensor", lambda **_: noise)
        scheduler = DDIMScheduler.from_config(model.scheduler_config)
        pipeline = DiTPipeline(transformer=model.denoiser, vae=model.vae, scheduler=scheduler)
        pipeline.set_progress_bar_config(disable=True)
        theirs = pipeline(
            [0, 1, 2], guidance_scale=guidance, num_inference_steps=6, output_type="pt"
        ).images

        settings = SamplingSettings(6, guidance, seed=5)
        samples = sample_images(
            model, model.as_denoiser(), settings, range(3), batch_size=3, device="cpu"
        )
        ours = decode_images(model, samples, 3) / 2 + 0.5
        # The same operations in the same order; only the final clamp and /2+0.5 are swapped,
        # which is worth one rounding of a number up to 1.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=torch.finfo(torch.float32).eps)


class TestKnownAnswer:
    """Where all data is the one point x0, eps = (x − √ᾱ x0)/√(1−ᾱ): every solver must end at x0."""

    @pytest.mark.parametrize(
        ("scheduler", "tolerance"),
        [
            ("DDIMScheduler", 1e-3),
            ("DDPMScheduler", 1e-3),
            ("DPMSolverMultistepScheduler", 1e-3),
            # These end at the smallest training noise √(1−ᾱ_0)/√ᾱ_0 = 0.01 or step through it
            # with a second evaluation; their distance from x0 is of that size.
            ("DPMSolverSinglestepScheduler", 0.05),
            ("UniPCMultistepScheduler", 0.05),
            ("DEISMultistepScheduler", 0.05),
            ("PNDMScheduler", 0.05),
        ],
    )
    def test_solvers_of_variance_preserving_x(self, scheduler: str, tolerance: float) -> None:
        target = torch.linspace(-1, 1, 4 * 8 * 8).reshape(SHAPE)
        alphas = DDIMScheduler.from_config(MODEL.scheduler_config).alphas_cumprod.double()

        def denoiser(x: Tensor, timestep: Tensor, _label: Tensor) -> Tensor:
            alpha = alphas[timestep][:, None, None, None]
            return (x - alpha.sqrt() * target) / (1 - alpha).sqrt()

        samples = draw(denoiser, SamplingSettings(20, 1.0, 0, scheduler))
        assert (samples - target).abs().max() < tolerance

    @pytest.mark.parametrize(
        "scheduler",
        ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler"],
    )
    def test_solvers_of_variance_exploding_x(self, scheduler: str) -> None:
        """Their scaled denoiser input is variance-preserving, so the same formula holds."""
        target = torch.linspace(-1, 1, 4 * 8 * 8).reshape(SHAPE)
        alphas = DDIMScheduler.from_config(MODEL.scheduler_config).alphas_cumprod.double()

        def denoiser(x: Tensor, timestep: Tensor, _label: Tensor) -> Tensor:
            alpha = alphas[timestep][:, None, None, None]
            return (x - alpha.sqrt() * target) / (1 - alpha).sqrt()

        samples = draw(denoiser, SamplingSettings(20, 1.0, 0, scheduler))
        assert (samples - target).abs().max() < 1e-2


class TestGuidance:
    def test_both_halves_go_in_one_call_and_are_mixed(self) -> None:
        calls: list[tuple[Tensor, Tensor, Tensor]] = []

        def denoiser(x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
            calls.append((x, timestep, label))
            return x * 0 + label[:, None, None, None].float() / 1000

        mixed = draw(denoiser, SamplingSettings(1, 3.0, 0), count=2)
        (x, timestep, label), *rest = calls
        assert not rest
        assert torch.equal(x[:2], x[2:])
        assert label.tolist() == [0, 1, 1000, 1000]
        assert timestep.dtype == label.dtype == torch.int64
        assert len(set(timestep.tolist())) == 1
        expected = torch.tensor([1 + 3 * (0 - 1.0), 1 + 3 * (0.001 - 1)])

        def constant(x: Tensor, _timestep: Tensor, _label: Tensor) -> Tensor:
            return x * 0 + expected[:, None, None, None]

        direct = draw(constant, SamplingSettings(1, 1.0, 0), count=2)
        torch.testing.assert_close(mixed, direct)

    def test_guidance_one_is_the_conditional_model_at_half_the_batch(self) -> None:
        sizes: list[int] = []

        def denoiser(x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
            sizes.append(len(x))
            return MODEL.as_denoiser()(x, timestep, label)

        alone = draw(denoiser, SamplingSettings(4, 1.0, 0), count=2)
        assert sizes == [2] * 4
        # 1.0 written as a mixture, through the guided path: the null half must cancel out
        nearly = draw(denoiser, SamplingSettings(4, 1.0 + 1e-12, 0), count=2)
        assert sizes[4:] == [4] * 4
        torch.testing.assert_close(alone, nearly, rtol=1e-4, atol=1e-4)


class TestNoise:
    def test_depends_on_seed_and_index_alone(self) -> None:
        whole = initial_noise(range(10), SHAPE, seed=3)
        assert torch.equal(initial_noise([7, 2], SHAPE, seed=3), whole[[7, 2]])
        assert not torch.equal(initial_noise([7], SHAPE, seed=4), whole[[7]])
        assert len({row.numpy().tobytes() for row in whole}) == 10

    def test_is_standard_normal(self) -> None:
        noise = initial_noise(range(400), SHAPE, seed=0).double()
        n = noise.numel()
        assert abs(noise.mean().item()) < 5 / n**0.5
        assert abs(noise.var().item() - 1) < 5 * (2 / n) ** 0.5
        # neighbouring indices are uncorrelated
        pairs = (noise[:-1] * noise[1:]).mean().item()
        assert abs(pairs) < 5 / n**0.5

    def test_golden_values(self) -> None:
        """Philox keyed (seed, index): changing it would change every published figure."""
        noise = initial_noise([2], (3,), seed=1)
        assert noise.dtype == torch.float32
        torch.testing.assert_close(noise[0], torch.tensor(GOLDEN_NOISE))

    @pytest.mark.parametrize(
        "scheduler", ["DDIMScheduler", "DDPMScheduler", "EulerAncestralDiscreteScheduler"]
    )
    def test_samples_do_not_depend_on_the_batch(self, scheduler: str) -> None:
        def denoiser(x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
            return (x * 0.9).tanh() + label[:, None, None, None] * 1e-3  # elementwise: exact

        settings = SamplingSettings(5, 1.5, 9, scheduler)
        whole = draw(denoiser, settings, batch_size=5)
        assert torch.equal(draw(denoiser, settings, batch_size=2), whole)
        some = sample_images(MODEL, denoiser, settings, [3, 1], batch_size=2, device="cpu")
        assert torch.equal(some, whole[[3, 1]])

    def test_the_global_generator_is_left_alone(self) -> None:
        torch.manual_seed(0)
        before = torch.get_rng_state()
        draw(MODEL.as_denoiser(), SamplingSettings(2, 1.0, 0, "DDPMScheduler"), count=1)
        assert torch.equal(torch.get_rng_state(), before)


class TestSteps:
    def test_on_step_sees_what_the_denoiser_gets(self) -> None:
        seen: list[tuple[int, int, Tensor, Tensor]] = []
        got: list[tuple[Tensor, Tensor]] = []

        def denoiser(x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
            got.append((x, timestep))
            return MODEL.as_denoiser()(x, timestep, label)

        draw(
            denoiser,
            SamplingSettings(4, 1.5, 0),
            count=3,
            on_step=lambda *facts: seen.append(facts),
        )
        # DDIM, leading spacing: multiples of 1000/4, largest first; two batches, of 2 and 1
        assert [fact[:2] for fact in seen] == [(0, 750), (1, 500), (2, 250), (3, 0)] * 2
        for (_, timestep, x, labels), (x_got, timesteps) in zip(seen, got, strict=True):
            assert torch.equal(torch.cat([x, x]), x_got)
            assert set(timesteps.tolist()) == {timestep}
            assert labels.tolist() in ([0, 1], [2])

    def test_progress_counts_batches_times_steps(self) -> None:
        class Counting:
            total: int | None = None
            done = 0

            def track(self, items: Any, description: str, total: int | None = None) -> Any:
                self.total = total
                for item in items:
                    yield item
                    self.done += 1

            def say(self, message: str) -> None:
                return None

        progress = Counting()
        draw(MODEL.as_denoiser(), SamplingSettings(3, 1.0, 0), count=5, progress=progress)
        assert progress.total == progress.done == 3 * 3

    def test_no_samples_give_an_empty_batch(self) -> None:
        assert draw(MODEL.as_denoiser(), SamplingSettings(3, 1.0, 0), count=0).shape == (0, *SHAPE)

    def test_results_can_be_changed_in_place(self) -> None:
        draw(MODEL.as_denoiser(), SamplingSettings(1, 1.0, 0), count=1).add_(1)


class TestTrajectory:
    """One sample at a time, the caller runs the denoiser: what serving does."""

    @pytest.mark.parametrize("guidance", [1.0, 3.0])
    def test_rows_and_advance_are_the_sampling_loop(self, guidance: float) -> None:
        settings = SamplingSettings(5, guidance, 3, "DPMSolverMultistepScheduler")
        trajectory = Trajectory(SampledModel.of(MODEL), settings, [4, 2])
        assert trajectory.row_count == (2 if guidance == 1.0 else 4)
        while trajectory.steps_left:
            trajectory.advance(MODEL.as_denoiser()(*trajectory.rows()))
        whole = sample_images(
            MODEL, MODEL.as_denoiser(), settings, [4, 2], batch_size=2, device="cpu"
        )
        assert torch.equal(trajectory.x, whole)

    @pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
    def test_foresees_what_ddim_predicts(self, kind: str) -> None:
        config = default_scheduler_config() | {"prediction_type": kind}
        facts = replace(SampledModel.of(MODEL), scheduler_config=config)
        trajectory = Trajectory(facts, SamplingSettings(5, 1.0, 3), [0])
        assert torch.equal(trajectory.foreseen(), trajectory.x)
        x, timesteps, _ = trajectory.rows()
        output = (x * 0.7).tanh()
        theirs = make_scheduler(config)
        theirs.set_timesteps(5)
        expected = theirs.step(output, timesteps[0], x).pred_original_sample
        trajectory.advance(output)
        torch.testing.assert_close(trajectory.foreseen(), expected)

    @pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "UniPCMultistepScheduler"])
    def test_foresees_the_image_with_schedulers_that_scale_or_remember(
        self, scheduler: str
    ) -> None:
        target = torch.linspace(-1, 1, 4 * 8 * 8).reshape(1, *SHAPE)
        alphas = DDIMScheduler.from_config(MODEL.scheduler_config).alphas_cumprod
        trajectory = Trajectory(
            SampledModel.of(MODEL), SamplingSettings(10, 1.0, 0, scheduler), [0]
        )
        while trajectory.steps_left:
            x, timestep, _ = trajectory.rows()
            alpha = alphas[timestep][:, None, None, None]
            trajectory.advance((x - alpha.sqrt() * target) / (1 - alpha).sqrt())
            # float32 rounding of x over the smallest signal, √ᾱ at the first step: 1e-7 / 0.006
            assert (trajectory.foreseen() - target).abs().max() < 1e-3


class TestLabels:
    def test_in_turn(self) -> None:
        assert labels_for([0, 1, 2, 3, 9], 3).tolist() == [0, 1, 2, 0, 0]
        assert labels_for([0], 3).dtype == torch.int64


class TestDecoding:
    def test_batches_and_scaling_factor(self) -> None:
        model = make_model(vae=True)
        latents = initial_noise(range(5), SHAPE, seed=0)
        images = decode_images(model, latents, 2)
        vae: Any = model.vae
        expected = vae.decode(latents / 0.18215).sample.clamp(-1, 1)
        assert images.shape == (5, 3, 16, 16)
        torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-5)

    def test_pixels_are_clamped(self) -> None:
        pixels = torch.tensor([-2.0, 0.5, 2.0]).reshape(1, 3, 1, 1)
        assert decode_images(MODEL, pixels, 1).flatten().tolist() == [-1.0, 0.5, 1.0]

    def test_latents_without_a_vae_are_refused(self) -> None:
        with pytest.raises(InputError, match=r"4 channels are latents and need a VAE .* vae/"):
            decode_images(MODEL, torch.zeros(1, *SHAPE), 1)


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((0, 1.5, 0), "steps must be between 1 and 1000, got 0"),
            ((1001, 1.5, 0), "steps must be between 1 and 1000, got 1001"),
            ((True, 1.5, 0), "steps must be between 1 and 1000, got True"),
            ((10, float("nan"), 0), "guidance scale must be finite and not negative, got nan"),
            ((10, -1.0, 0), "guidance scale must be finite and not negative, got -1.0"),
            ((10, 1.5, -1), "seed must be between 0 and .*, got -1"),
            ((10, 1.5, 1 << 64), "seed must be between 0 and "),
        ],
        ids=str,
    )
    def test_settings(self, arguments: tuple[Any, ...], message: str) -> None:
        with pytest.raises(InputError, match=message):
            SamplingSettings(*arguments)

    def test_unknown_scheduler(self) -> None:
        with pytest.raises(InputError, match=r"must be one of .*DDIMScheduler.*, got 'Magic'"):
            make_scheduler({}, "Magic")

    def test_learned_variance(self) -> None:
        config = default_scheduler_config() | {"variance_type": "learned_range"}
        with pytest.raises(InputError, match="variance_type must not be learned"):
            make_scheduler(config, "DDPMScheduler")

    def test_fractional_timesteps(self) -> None:
        model = make_model()
        model.scheduler_config["timestep_spacing"] = "linspace"
        settings = SamplingSettings(7, 1.0, 0, "EulerDiscreteScheduler")
        with pytest.raises(InputError, match=r"whole numbers, got .*timestep_spacing 'leading'"):
            sample_images(model, model.as_denoiser(), settings, [0], batch_size=1, device="cpu")

    @pytest.mark.parametrize(
        ("scheduler", "steps"), [("PNDMScheduler", 3), ("DPMSolverMultistepScheduler", 1000)]
    )
    def test_steps_that_a_scheduler_cannot_take(self, scheduler: str, steps: int) -> None:
        settings = SamplingSettings(steps, 1.0, 0, scheduler)
        with pytest.raises(InputError, match=f"{scheduler} cannot take {steps} steps"):
            sample_images(MODEL, MODEL.as_denoiser(), settings, [0], batch_size=1, device="cpu")

    def test_batch_size(self) -> None:
        with pytest.raises(InputError, match="batch size must be at least 1, got 0"):
            draw(MODEL.as_denoiser(), SamplingSettings(3, 1.0, 0), batch_size=0)

    def test_the_model_s_own_class_is_the_default(self) -> None:
        config = default_scheduler_config()
        assert type(make_scheduler(config)).__name__ == "DDIMScheduler"
        config["_class_name"] = "UniPCMultistepScheduler"
        assert type(make_scheduler(config)).__name__ == "UniPCMultistepScheduler"
        del config["_class_name"]
        assert type(make_scheduler(config)).__name__ == "DDIMScheduler"
