"""The embedded demo model: class-conditional CIFAR-10 in pixel space (demo/README.md)."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from pathlib import Path

import torch

from ... import demo as package
from ...errors import InputError
from ..model import DiffusionModel, ModelSource
from . import diffusers_folder

NAME = "demo"
CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


def load(*, device: torch.device | str, blocks: int | None) -> DiffusionModel:
    """The demo with the features and reference statistics that its FID is measured by."""
    folder = resources.files(package)
    if not isinstance(folder, Path):  # inside a zip there is no file to map
        raise InputError("the demo needs qdit unpacked on disk; install it with pip")
    model = diffusers_folder.load(folder, device=device, blocks=blocks)
    return replace(
        model,
        name=NAME,
        source=ModelSource("demo", NAME, model.source.sha256),
        features=folder / "features.onnx",
        reference=folder / "reference.npz",
        class_names=CIFAR10_CLASSES,
    )
