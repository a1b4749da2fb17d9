"""SmoothQuant as a step of an export: measure full precision's inputs, then fold their outliers."""

from __future__ import annotations

from ..calibrate.calibration_set import CalibrationSet
from ..calibrate.input_ranges import collect_input_ranges
from ..calibrate.model import DiffusionModel
from ..calibrate.smoothing import sites_of, smooth_model
from ..errors import InputError
from ..progress import Progress


def smooth_for_calibration(
    model: DiffusionModel,
    samples: CalibrationSet | None,
    alpha: float,
    batch_size: int,
    progress: Progress,
) -> None:
    """Smooth `model` in place by what it reads on `samples`; its outputs stay what they were.

    Raises `InputError` without samples, and for a family that has nothing to fold into.
    """
    if samples is None:
        raise InputError("smoothing needs a calibration set; collect it first")
    names = {site.input_name for site in sites_of(model.family, model.denoiser)}
    read = [spec for spec in model.linears if spec.input_name in names]
    ranges = collect_input_ranges(
        model.family, model.denoiser, read, samples, batch_size=batch_size, progress=progress
    )
    factors = smooth_model(model, ranges, alpha)
    progress.say(f"smoothed {len(factors)} inputs with strength {alpha:g}, folded into adaLN")
