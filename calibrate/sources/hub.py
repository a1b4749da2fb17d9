"""Models on the Hugging Face Hub: fetched into its cache, then read as a diffusers folder."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..model import DiffusionModel, ModelSource
from . import diffusers_folder
from .hub_files import fetch


def load(model_id: str, *, device: torch.device | str, blocks: int | None) -> DiffusionModel:
    """Load `model_id` ('facebook/DiT-XL-2-256'); files that the cache has are not fetched again."""
    folder = fetch(model_id)
    model = diffusers_folder.load(folder, device=device, blocks=blocks)
    source = ModelSource("diffusers", model_id, model.source.sha256)
    return replace(model, name=model_id, source=source)
