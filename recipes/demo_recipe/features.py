"""Features of images by the extractor's ONNX model on the CPU."""

from pathlib import Path

import numpy as np
import onnxruntime
import torch

from demo_recipe.errors import RecipeError
from demo_recipe.images import to_unit_range

BATCH = 500


class FeatureModel:
    """An ONNX model with input ``images`` [N, 3, 32, 32] in -1...1 and output ``features``."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise RecipeError(
                f"the feature extractor must exist, got {str(path)!r}; "
                "train_demo.py writes one as features.onnx"
            )
        try:
            self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own errors share no narrower base
            raise RecipeError(f"onnxruntime cannot load {str(path)!r}: {error}") from error

    def __call__(self, images: torch.Tensor) -> np.ndarray:
        """Features float32 [N, D] of uint8 ``images`` [N, 3, 32, 32]."""
        parts = [
            self.session.run(["features"], {"images": to_unit_range(part).numpy()})[0]
            for part in images.split(BATCH)
        ]
        return np.concatenate(parts)
