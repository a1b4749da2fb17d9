"""Paired images in one figure: peak signal-to-noise ratio, quantized against full precision."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..calibrate.psnr import psnr
from ..errors import InputError


@dataclass(frozen=True)
class ImageParity:
    """PSNR over n image pairs, in dB; None where it would be infinite or is not defined.

    psnr_db: 10 log10(PEAK² / mean of all images' mean squared errors);
    worst / median: of the images' own PSNRs, with the worst image's index;
    identical: every pair is equal; not_finite: images with NaN or infinity in either of the pair.
    """

    samples: int
    psnr_db: float | None
    psnr_db_min: float | None
    psnr_db_median: float | None
    worst_image: int | None
    mean_squared_error: float | None
    identical: bool
    not_finite: int


def image_parity(squared_error: ArrayLike) -> ImageParity:
    """From each pair's mean squared error [n] over its values in [-1, 1]."""
    errors = np.asarray(squared_error, dtype=np.float64)
    if errors.ndim != 1 or errors.size == 0:
        raise InputError(f"image parity needs squared errors [n], got shape {list(errors.shape)}")
    broken = int((~np.isfinite(errors)).sum())
    if broken:
        worst = int(np.flatnonzero(~np.isfinite(errors))[0])
        return ImageParity(len(errors), None, None, None, worst, None, False, broken)
    mean = float(errors.mean())
    return ImageParity(
        samples=len(errors),
        psnr_db=psnr(mean),
        psnr_db_min=psnr(float(errors.max())),
        # the median of the PSNRs is the PSNR of the median error: PSNR falls as the error grows
        psnr_db_median=psnr(_upper_median(errors)),
        worst_image=int(errors.argmax()) if mean > 0 else None,
        mean_squared_error=mean,
        identical=mean == 0,
        not_finite=0,
    )


def _upper_median(errors: NDArray[np.float64]) -> float:
    return float(np.sort(errors)[len(errors) // 2])
