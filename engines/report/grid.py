"""Pictures of samples: full precision, quantized, and ten times their difference."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...calibrate.features import to_uint8
from ...files import atomic_path

DIFFERENCE_GAIN = 10
# Small images are enlarged by whole factors (each pixel a square) to about this width, large ones
# reduced to the limits: nobody compares 512 pixels in a row of ten.
_CELL = 112
_LARGEST_IN_GRID = 256
_LARGEST_IN_PAGE = 192
_GAP = 4
_LABEL_WIDTH = 132
_CAPTION_HEIGHT = 22
_FONT_SIZE = 14

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Samples:
    """The same k images three times, uint8 [k, H, W, 3], with a caption for each (or none)."""

    full: Pixels
    quantized: Pixels
    difference: Pixels
    captions: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        return len(self.full)


def make_samples(full: Tensor, quantized: Tensor, captions: Sequence[str] = ()) -> Samples:
    """From images [k, 3, H, W] in [-1, 1].

    The difference is drawn about mid-grey: 127.5 + 10 · (quantized − full) · 127.5, clipped, so
    grey is 'equal' and colour says in which direction a channel moved.
    """
    difference = DIFFERENCE_GAIN * (quantized - full)
    return Samples(_pixels(full), _pixels(quantized), _pixels(difference), tuple(captions))


def _pixels(images: Tensor) -> Pixels:
    clean = torch.nan_to_num(images.detach().cpu().float(), nan=1.0, posinf=1.0, neginf=-1.0)
    array: Pixels = to_uint8(clean).permute(0, 2, 3, 1).contiguous().numpy()
    return array


def write_grid(samples: Samples, path: Path, quantized_label: str = "quantized") -> None:
    """Write samples.png: three labelled rows, one column an image, on white."""
    rows = (
        (("full", "precision"), samples.full),
        ((quantized_label,), samples.quantized),
        (("difference", f"× {DIFFERENCE_GAIN}"), samples.difference),
    )
    width, height = _scaled(samples.full[0]).size
    top = _CAPTION_HEIGHT if samples.captions else _GAP
    size = (
        _LABEL_WIDTH + samples.count * (width + _GAP),
        top + len(rows) * (height + _GAP),
    )
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = _font(_FONT_SIZE)
    for column, caption in enumerate(samples.captions[: samples.count]):
        middle = _LABEL_WIDTH + column * (width + _GAP) + width // 2
        draw.text((middle, top // 2), caption, "#444444", font, anchor="mm")
    for row, (label, images) in enumerate(rows):
        y = top + row * (height + _GAP)
        text = "\n".join(label)
        draw.multiline_text((_GAP, y + height // 2), text, "#111111", font, anchor="lm")
        for column, pixels in enumerate(images):
            sheet.paste(_scaled(pixels), (_LABEL_WIDTH + column * (width + _GAP), y))
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


def encode(pixels: Pixels) -> tuple[str, bytes]:
    """One image [H, W, 3] for the page: (media type, bytes).

    Small images stay as they are in PNG (the page enlarges them); large ones are reduced to
    JPEG, since the page shows them small and must stay a file that can be sent around.
    """
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    if max(image.size) <= _CELL:
        image.save(buffer, format="PNG", optimize=True)
        return "image/png", buffer.getvalue()
    image.thumbnail((_LARGEST_IN_PAGE, _LARGEST_IN_PAGE), Image.Resampling.LANCZOS)
    image.save(buffer, format="JPEG", quality=92)
    return "image/jpeg", buffer.getvalue()


def _scaled(pixels: Pixels) -> Image.Image:
    image = Image.fromarray(pixels)
    if max(image.size) > _LARGEST_IN_GRID:
        image.thumbnail((_LARGEST_IN_GRID, _LARGEST_IN_GRID), Image.Resampling.LANCZOS)
        return image
    factor = max(1, round(_CELL / image.width))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _font(size: int) -> ImageFont.FreeTypeFont:
    """The font that matplotlib ships: the same picture on every machine."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size)
