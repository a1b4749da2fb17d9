"""From samples to image files in memory."""

from __future__ import annotations

import io
from contextlib import nullcontext
from typing import Literal, get_args

import torch
from PIL import Image
from torch import Tensor, nn

from ..calibrate.features import to_uint8
from ..calibrate.sampling import decode_samples
from .torch_threads import many_threads

ImageFormat = Literal["png", "jpeg", "webp"]
FORMATS: tuple[str, ...] = get_args(ImageFormat)
DEFAULT_QUALITY = 90


def encode_sample(
    sample: Tensor, vae: nn.Module | None, image_format: ImageFormat, quality: int | None = None
) -> bytes:
    """One sample [C, H, W], pixels or latents, as the bytes of a file.

    `quality` 0 … 100 is for jpeg and webp. Equal samples give equal bytes.
    """
    with nullcontext() if vae is None else many_threads():
        pixels = decode_samples(vae, sample[None].detach(), 1)[0]
    pixels = torch.nan_to_num(pixels, nan=0.0)  # a preview of a sample that went wrong
    image = Image.fromarray(to_uint8(pixels).permute(1, 2, 0).contiguous().numpy())
    file = io.BytesIO()
    options = (
        {}
        if image_format == "png"
        else {"quality": DEFAULT_QUALITY if quality is None else quality}
    )
    image.save(file, image_format, **options)
    return file.getvalue()
