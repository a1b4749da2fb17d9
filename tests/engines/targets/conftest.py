"""A small model folder whose export takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qdit.engines import parity

from ..tensorrt.conftest import fake, newest

__all__ = ["fake", "newest"]


@pytest.fixture(scope="session")
def model_folder(save_dit: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder: one block, hidden 128, 16×16×3 pixels, adaLN away from zero."""
    return save_dit(
        tmp_path_factory.mktemp("small-model"), attention_head_dim=64, num_layers=1, sample_size=16
    )


@pytest.fixture(autouse=True)
def few_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """These exports are judged by what they write, not by the proof: it need not be stable."""
    monkeypatch.setattr(parity, "_FEWEST_ACTIVATIONS", 1.0)
