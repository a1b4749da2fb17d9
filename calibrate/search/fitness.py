"""Fitness of a candidate plan: FID of its images, by the project's own sampler and FID.

Every candidate is sampled from the same noise and labels, so that differences between candidates
are differences between plans (Q-DiT, arXiv 2406.17343, Algorithm 1: 800 images, 50 steps, no
guidance, one fixed seed).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import InputError
from ..features import FeatureExtractor
from ..frechet import Array, Statistics, frechet_distance, statistics
from ..model import DiffusionModel
from ..plan import QuantizationPlan
from ..psnr import psnr
from ..sampling import SamplingSettings, decode_images, sample_images

PAPER_IMAGES = 800
PAPER_STEPS = 50
_DECODED_AT_ONCE = 16


@dataclass(frozen=True)
class FitnessSettings:
    """How a candidate is judged.

    `paired_psnr` costs each evaluator one full-precision sampling; `fast` compiles the candidates'
    denoiser (`CandidateDenoiser`), for CUDA.
    """

    sampling: SamplingSettings
    samples: int = PAPER_IMAGES
    batch_size: int = 50
    paired_psnr: bool = True
    fast: bool = False

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise InputError(f"FID needs at least 2 images a candidate, got {self.samples}")
        if self.batch_size < 1:
            raise InputError(f"the batch size must be at least 1, got {self.batch_size}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def paper_settings(seed: int = 0, batch_size: int = 50) -> FitnessSettings:
    """800 images at 50 steps without guidance."""
    return FitnessSettings(SamplingSettings(PAPER_STEPS, 1.0, seed), PAPER_IMAGES, batch_size)


@dataclass(frozen=True)
class Fitness:
    """FID (lower is better; infinite for images that are not finite, None without a feature
    network) and how it was come by.

    psnr_db: 10 log10(2² / mean squared error) against the full-precision model's images from the
    same noise; None where that is infinite, undefined or was not asked for.
    seconds: wall time of the evaluation, which no comparison of results looks at.
    """

    fid: float | None
    psnr_db: float | None
    seconds: float = field(compare=False)


@dataclass(frozen=True)
class CandidateFailure:
    """A candidate that no worker could evaluate. It ranks behind every fitness."""

    reason: str


Outcome = Fitness | CandidateFailure


class Switchable(Protocol):
    """One denoiser that takes on any plan (`switchable.CandidateDenoiser`)."""

    @property
    def module(self) -> nn.Module: ...

    def apply(self, plan: QuantizationPlan) -> None: ...

    def reset(self) -> None: ...


class Evaluator:
    """Plan → `Fitness`. The full-precision images are made once, at construction.

    `device` is where the denoiser's inputs go. Without an extractor and a reference no FID is
    computed. Raises `InputError` at construction if the feature
    network, the reference and the model do not go together, or if the model's own images are not
    finite: nothing of that is a candidate's fault.
    """

    def __init__(
        self,
        model: DiffusionModel,
        candidate: Switchable,
        extractor: FeatureExtractor | None,
        reference: Statistics | None,
        settings: FitnessSettings,
        *,
        device: torch.device | str,
    ) -> None:
        self.settings = settings
        self.full_precision: Fitness | None = None
        self._model = model
        self._candidate = candidate
        self._extractor = extractor
        self._reference = reference
        self._device = torch.device(device)
        self._full_images: list[Tensor] = []
        if settings.paired_psnr:
            self._sample_full_precision()

    def __call__(self, plan: QuantizationPlan) -> Fitness:
        """FID and PSNR of the plan's images. The denoiser is left at full precision."""
        self._candidate.apply(plan)
        try:
            return self._measure(self._full_images)
        finally:
            self._candidate.reset()

    def _sample_full_precision(self) -> None:
        self._candidate.reset()
        kept: list[Tensor] = []
        self.full_precision = self._measure([], keep=kept)
        if self.full_precision.fid == math.inf:
            raise InputError(
                f"the full-precision images of {self._model.name} must be finite, got NaN or "
                "infinity; check the model and its scheduler"
            )
        self._full_images = kept

    def _measure(self, full: list[Tensor], keep: list[Tensor] | None = None) -> Fitness:
        """Sample all images, batch by batch; `full` are the batches to compare with, if any."""
        started = time.perf_counter()
        features: list[Future[Array]] = []
        squared_error = 0.0
        # on a GPU beside the next batch's sampling, which leaves the CPU idle
        with ThreadPoolExecutor(max_workers=1) as beside:
            for number, images in enumerate(self._batches()):
                if not torch.isfinite(images).all():
                    return Fitness(math.inf, None, time.perf_counter() - started)
                if self._extractor is not None:
                    features.append(beside.submit(self._extractor, images))
                    if self._device.type == "cpu":
                        features[-1].result()
                if full:
                    squared_error += float(
                        (images - full[number]).double().square().mean((1, 2, 3)).sum()
                    )
                if keep is not None:
                    keep.append(images)
        fid = self._fid([batch.result() for batch in features])
        error = squared_error / self.settings.samples if full else None
        return Fitness(fid, psnr(error), time.perf_counter() - started)

    def _fid(self, batches: list[Array]) -> float | None:
        if self._reference is None or not batches:
            return None
        features = np.concatenate(batches)
        if not np.isfinite(features).all():
            return math.inf
        return frechet_distance(statistics(features), self._reference)

    def _batches(self) -> Iterator[Tensor]:
        """Images [n, 3, H, W] in [-1, 1] of one batch after the other."""
        denoiser = self._model.as_denoiser(self._candidate.module)
        settings = self.settings
        for start in range(0, settings.samples, settings.batch_size):
            indices = range(start, min(start + settings.batch_size, settings.samples))
            samples = sample_images(
                self._model,
                denoiser,
                settings.sampling,
                indices,
                batch_size=settings.batch_size,
                device=self._device,
            )
            yield decode_images(self._model, samples, min(len(indices), _DECODED_AT_ONCE))
