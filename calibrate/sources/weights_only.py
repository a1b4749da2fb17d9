"""Read state dicts that `torch.save` wrote, without running any code that is in them."""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path
from typing import Any

import torch

from ...errors import InputError


def read_pickled(path: Path) -> dict[str, Any]:
    """The dictionary in a `.pt`/`.bin` file, memory-mapped where the format allows it.

    Only tensors, containers, numbers and strings are accepted, and `argparse.Namespace`: DiT's
    training script stores its flags as one beside the weights, and it is plain data. Everything
    else is refused before it is constructed. Raises `InputError`.
    """
    mappable = zipfile.is_zipfile(path)  # torch < 1.6 wrote another format
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            value = torch.load(  # noqa: TID251  the one place: weights_only runs no pickled code
                path, map_location="cpu", weights_only=True, mmap=mappable
            )
    except Exception as error:  # unpickling a foreign file can fail in any way
        reason = "it holds more than weights" if "Weights only" in str(error) else first_line(error)
        raise InputError(f"{path} is not a state dict that is safe to read: {reason}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a state dict, got {type(value).__name__}")
    return value


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
