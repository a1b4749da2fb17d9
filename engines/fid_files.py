"""The feature network and reference statistics of FID: from the flags, or beside the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..calibrate.features import FeatureExtractor, load_features
from ..calibrate.fid import Statistics, read_reference
from ..calibrate.model import DiffusionModel
from ..errors import InputError
from .options import ProofOptions


@dataclass(frozen=True)
class FidFiles:
    """The feature network and reference statistics in use, or why there are none."""

    extractor: FeatureExtractor | None
    reference: Statistics | None
    features_path: Path | None
    reference_path: Path | None
    missing: str


def load_fid_files(options: ProofOptions, model: DiffusionModel) -> FidFiles:
    """The files of the flags, else those that came with the model; checked before long work."""
    features = options.fid_features or model.features
    reference = options.reference or model.reference
    if (options.fid_features is None) != (options.reference is None) and model.features is None:
        raise InputError(
            "--fid-features and --reference belong together: the statistics must be of the same "
            "features; give both"
        )
    if features is None or reference is None:
        missing = "no feature network and reference statistics were given (--fid-features FILE "
        return FidFiles(None, None, None, None, missing + "and --reference FILE)")
    extractor = load_features(features, device=model.device, threads=options.threads)
    return FidFiles(extractor, read_reference(reference), features, reference, "")
