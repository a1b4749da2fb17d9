"""Synthetic images in the layout of CIFAR-10-images, and the recipes on the import path."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

CLASSES = [f"class{number}" for number in range(10)]


def write_split(folder: Path, per_class: int, seed: int) -> None:
    """Random 32×32 PNGs whose mean colour depends on the class."""
    generator = np.random.default_rng(seed)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = generator.integers(0, 120, (32, 32, 3)) + 13 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number:04}.png")


def make_images(root: Path) -> Path:
    """100 training and 20 test images in ten classes."""
    write_split(root / "train", per_class=10, seed=0)
    write_split(root / "test", per_class=2, seed=1)
    return root


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images that no test changes."""
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def own_images(tmp_path: Path) -> Path:
    """A folder of images for one test to spoil."""
    return make_images(tmp_path / "images")


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """One thread: the models are tiny, and threads that wait for each other on a busy machine
    take longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
