"""Checkpoints of a run: one safetensors file with the tensors and, as metadata, the counters."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from demo_recipe.errors import RecipeError
from demo_recipe.files import write_atomically

FORMAT = "1"


@dataclass
class Counters:
    """Where a run stands: steps done, training seconds, ``[step, mean loss, seconds]`` rows."""

    step: int = 0
    seconds: float = 0.0
    history: list[list[float]] = field(default_factory=list)


def save_checkpoint(path: Path, tensors: dict[str, torch.Tensor], counters: Counters) -> None:
    """Write a checkpoint atomically."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {"format": FORMAT, "counters": json.dumps(vars(counters))}
    write_atomically(path, lambda temporary: save_file(plain, temporary, metadata))


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], Counters]:
    """Read a checkpoint.

    Raises:
        RecipeError: the file is damaged or of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"format {metadata.get('format')!r}")
            counters = Counters(**json.loads(metadata["counters"]))
            return {name: file.get_tensor(name) for name in file.keys()}, counters  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"cannot read the checkpoint {str(path)!r} ({error}); pass --no-resume to start over"
        ) from error
