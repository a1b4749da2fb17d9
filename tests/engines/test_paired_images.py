"""Images in pairs: the same figures whatever the batch size, and after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qdit.calibrate.families import family_named
from qdit.calibrate.model import DiffusionModel, ModelSource
from qdit.calibrate.sampling import SamplingSettings
from qdit.engines.paired_images import GRID_IMAGES, PairedImages, sample_pairs

CONFIG = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 1,
    "attention_head_dim": 16,
    "in_channels": 3,
    "out_channels": 3,
    "num_layers": 1,
    "sample_size": 8,
    "patch_size": 4,
    "num_embeds_ada_norm": 4,
}


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    family = family_named("dit")
    torch.manual_seed(0)
    scheduler = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000}
    source = ModelSource("random", "random:tiny", "", 0)
    return DiffusionModel("tiny", source, family, family.build(CONFIG), CONFIG, scheduler)


def off_by(model: DiffusionModel, share: float):
    """The model's denoiser with its prediction scaled: a known, paired difference."""
    call = model.as_denoiser()

    def denoiser(x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        return call(x, timestep, label) * (1 + share)

    return denoiser


class Mean:
    """A feature 'network' of three features that anybody can check."""

    path = Path("mean")

    def __call__(self, images: Tensor):
        return images.double().mean(dim=(2, 3)).numpy()


def pairs(model: DiffusionModel, folder: Path, batch_size: int, share: float = 0.1) -> PairedImages:
    return sample_pairs(
        model,
        model.as_denoiser(),
        off_by(model, share),
        SamplingSettings(3, 1.5, 0),
        13,
        batch_size=batch_size,
        extractor=Mean(),
        folder=folder,
    )


def test_the_batch_size_changes_nothing(model: DiffusionModel, tmp_path: Path) -> None:
    whole, parts = pairs(model, tmp_path / "13", 13), pairs(model, tmp_path / "4", 4)
    assert whole.count == parts.count == 13
    torch.testing.assert_close(whole.squared_error, parts.squared_error, rtol=1e-4, atol=1e-9)
    assert whole.features_full is not None
    assert parts.features_full is not None
    torch.testing.assert_close(whole.features_full, parts.features_full, rtol=1e-4, atol=1e-6)
    assert len(whole.full) == len(parts.full) == GRID_IMAGES
    torch.testing.assert_close(whole.quantized, parts.quantized, rtol=1e-4, atol=1e-5)


def test_the_squared_error_is_that_of_the_images(model: DiffusionModel, tmp_path: Path) -> None:
    found = pairs(model, tmp_path, 13)
    expected = (found.full.double() - found.quantized.double()).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(found.squared_error[:GRID_IMAGES], expected, rtol=1e-6, atol=0)
    assert (found.squared_error > 0).all()


def test_equal_denoisers_make_equal_images(model: DiffusionModel, tmp_path: Path) -> None:
    assert (pairs(model, tmp_path, 8, share=0.0).squared_error == 0).all()


def test_finished_batches_are_not_sampled_again(model: DiffusionModel, tmp_path: Path) -> None:
    first = pairs(model, tmp_path, 4)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) == 4
    times = [shard.stat().st_mtime_ns for shard in shards[:-1]]
    shards[-1].unlink()
    again = pairs(model, tmp_path, 4)
    assert [shard.stat().st_mtime_ns for shard in shards[:-1]] == times
    assert torch.equal(first.squared_error, again.squared_error)
