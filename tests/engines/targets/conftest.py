"""A small model folder whose export takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel

from qdit.engines import parity

from ..tensorrt.conftest import fake, newest

__all__ = ["fake", "newest"]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder: one block, hidden 128, 16×16×3 pixels, adaLN away from zero."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=3,
        out_channels=3,
        num_layers=1,
        sample_size=16,
        patch_size=4,
        num_embeds_ada_norm=10,
        norm_eps=1e-5,
        norm_elementwise_affine=False,
        activation_fn="gelu-approximate",
        attention_bias=True,
        norm_type="ada_norm_zero",
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    folder = tmp_path_factory.mktemp("small-model")
    model.save_pretrained(folder / "transformer")
    DDIMScheduler().save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(autouse=True)
def few_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """These exports are judged by what they write, not by the proof: it need not be stable."""
    monkeypatch.setattr(parity, "_FEWEST_ACTIVATIONS", 1.0)
