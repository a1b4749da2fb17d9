"""Peak signal-to-noise ratio of images in [-1, 1]."""

from __future__ import annotations

import math

PEAK = 2.0


def psnr(mean_squared_error: float | None) -> float | None:
    """10 log10(PEAK² / mse) in dB; None where there is no error, or none that is finite."""
    if not mean_squared_error or not math.isfinite(mean_squared_error):
        return None
    return 10.0 * math.log10(PEAK**2 / mean_squared_error)
