"""Fixtures that every folder of tests may use."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parent.parent
_NOT_SOURCE = (
    "*.egg-info",
    "__pycache__",
    "build",
    "dist",
    "tests",
    "recipes",
    "docs",
    "benchmarks",
)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return _ROOT


@pytest.fixture(scope="session")
def copy_source() -> Callable[[Path], Path]:
    """A function that copies the package's source, and no build output, into a new folder."""

    def copy(target: Path) -> Path:
        ignore = shutil.ignore_patterns(".*", *_NOT_SOURCE)
        shutil.copytree(_ROOT, target, ignore=ignore)
        return target

    return copy
