"""Images of two denoisers from the same noise, made batch by batch and kept as figures.

Only what the report needs is stored: features, squared errors and the first images. So 10,000
pairs of 256×256 images fit in megabytes, and a killed run goes on after its last whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..calibrate.families.base import Denoiser
from ..calibrate.features import FeatureExtractor
from ..calibrate.model import DiffusionModel
from ..calibrate.sampling import SamplingSettings, decode_images, sample_images
from ..files import atomic_path
from ..progress import Progress, Silent

GRID_IMAGES = 10


@dataclass(frozen=True)
class PairedImages:
    """Figures over n image pairs.

    squared_error: float64 [n], mean over one image's values in [-1, 1];
    full / quantized: the first images, float32 [≤ GRID_IMAGES, 3, H, W] in [-1, 1];
    features_full / features_quantized: float64 [n, D], or None without an extractor.
    """

    squared_error: Tensor
    full: Tensor
    quantized: Tensor
    features_full: Tensor | None
    features_quantized: Tensor | None

    @property
    def count(self) -> int:
        return self.squared_error.shape[0]


def sample_pairs(
    model: DiffusionModel,
    full: Denoiser,
    quantized: Denoiser,
    settings: SamplingSettings,
    count: int,
    *,
    batch_size: int,
    extractor: FeatureExtractor | None,
    folder: Path,
    progress: Progress | None = None,
) -> PairedImages:
    """Sample `count` pairs; each batch's figures are written to `folder` as soon as they are known.

    Image i starts from the same noise and label under both denoisers, whatever the batch size.
    """
    progress = progress or Silent()
    batches = list(_batches(count, batch_size))
    for batch in progress.track(batches, "images in pairs", total=len(batches)):
        shard = _shard(folder, batch)
        if not shard.exists():
            figures = _pair(model, full, quantized, settings, batch, extractor)
            with atomic_path(shard) as temporary:
                save_file(figures, temporary)
    return read_pairs(folder, count, batch_size)


def read_pairs(folder: Path, count: int, batch_size: int) -> PairedImages:
    """The figures that a finished `sample_pairs` of the same `count` and `batch_size` wrote."""
    return _join([load_file(_shard(folder, batch)) for batch in _batches(count, batch_size)])


def _batches(count: int, size: int) -> Iterator[range]:
    for start in range(0, count, size):
        yield range(start, min(start + size, count))


def _shard(folder: Path, batch: range) -> Path:
    return folder / f"images-{batch[0]:06d}-{batch[-1]:06d}.safetensors"


def _pair(
    model: DiffusionModel,
    full: Denoiser,
    quantized: Denoiser,
    settings: SamplingSettings,
    indices: range,
    extractor: FeatureExtractor | None,
) -> dict[str, Tensor]:
    first = _images(model, full, settings, indices)
    second = _images(model, quantized, settings, indices)
    figures = {"squared_error": (first - second).double().square().flatten(1).mean(1)}
    kept = max(0, min(GRID_IMAGES - indices[0], len(indices)))
    figures["full"] = first[:kept].contiguous()
    figures["quantized"] = second[:kept].contiguous()
    if extractor is not None:
        figures["features_full"] = torch.as_tensor(extractor(first))
        figures["features_quantized"] = torch.as_tensor(extractor(second))
    return figures


def _images(
    model: DiffusionModel, denoiser: Denoiser, settings: SamplingSettings, indices: range
) -> Tensor:
    samples = sample_images(
        model, denoiser, settings, indices, batch_size=len(indices), device=model.device
    )
    return decode_images(model, samples, batch_size=min(len(indices), 16)).cpu()


def _join(shards: list[dict[str, Tensor]]) -> PairedImages:
    joined = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
    return PairedImages(
        joined["squared_error"],
        joined["full"],
        joined["quantized"],
        joined.get("features_full"),
        joined.get("features_quantized"),
    )
