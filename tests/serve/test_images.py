"""Image files in memory, read back by Pillow."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from qdit.serve.images import FORMATS, encode_sample


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_png_holds_the_rounded_pixels() -> None:
    # -1, 0, 1 and out of range → 0, 128, 255 by (x·127.5 + 128) floored, as ADM writes images
    sample = torch.tensor([-1.0, 0.0, 1.0, 7.0]).repeat(3, 1, 1)
    pixels = decoded(encode_sample(sample, None, "png"))
    assert pixels.shape == (1, 4, 3)
    assert pixels[0, :, 0].tolist() == [0, 128, 255, 255]


def test_equal_samples_give_equal_bytes() -> None:
    sample = torch.rand(3, 16, 16) * 2 - 1
    for kind in FORMATS:
        assert encode_sample(sample, None, kind) == encode_sample(sample.clone(), None, kind)


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_quality_trades_bytes_for_likeness(kind: str) -> None:
    sample = torch.rand(3, 64, 64) * 2 - 1
    exact = decoded(encode_sample(sample, None, "png")).astype(float)
    sizes, errors = [], []
    for quality in (0, 50, None, 100):
        data = encode_sample(sample, None, kind, quality)
        sizes.append(len(data))
        errors.append(np.abs(decoded(data) - exact).mean())
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)


def test_a_preview_that_went_wrong_is_still_an_image() -> None:
    assert decoded(encode_sample(torch.full((3, 2, 2), torch.nan), None, "png")).max() == 128


def test_latents_go_through_the_vae() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    ).eval()
    latents = torch.randn(4, 8, 8)
    with torch.no_grad():
        expected = vae.decode(latents[None] / vae.config.scaling_factor).sample[0].clamp(-1, 1)
    pixels = decoded(encode_sample(latents, vae, "png")).astype(float)
    assert pixels.shape == (16, 16, 3)
    # one step of 255: the product with the reciprocal is rounded once more than the quotient
    assert np.abs(pixels - (expected.permute(1, 2, 0).numpy() * 127.5 + 127.5)).max() <= 1.01
