"""Write the three files of a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ...errors import InputError
from ...files import write_text
from . import schema
from .grid import Samples, make_samples, write_grid
from .html import render
from .schema import Report

HTML_NAME = "report.html"
SAMPLES_NAME = "samples.png"


def write_report(
    report: Report,
    folder: Path,
    full: Tensor | None = None,
    quantized: Tensor | None = None,
    captions: Sequence[str] = (),
) -> list[Path]:
    """Write report.json, report.html and, where there are images, samples.png into `folder`.

    `full` and `quantized`: the first image pairs [k, 3, H, W] in [-1, 1]; `captions`: one for each
    (class names). Returns the paths written. Each file is replaced as a whole or not at all.
    """
    samples = _samples(full, quantized, captions)
    written = [folder / schema.NAME, folder / HTML_NAME]
    if samples is not None:
        written.append(folder / SAMPLES_NAME)
        write_grid(samples, written[-1], report.plan.bits)
    write_text(folder / HTML_NAME, render(report, samples))
    report.write(folder / schema.NAME)
    return written


def _samples(
    full: Tensor | None, quantized: Tensor | None, captions: Sequence[str]
) -> Samples | None:
    if full is None or quantized is None or len(full) == 0:
        return None
    if full.shape != quantized.shape or full.ndim != 4 or full.shape[1] != 3:
        raise InputError(
            f"sample images must be two tensors [k, 3, H, W] of one shape, got {list(full.shape)} "
            f"and {list(quantized.shape)}"
        )
    if captions and len(captions) != len(full):
        raise InputError(f"{len(full)} images need as many captions or none, got {len(captions)}")
    return make_samples(full, quantized, captions)
