"""What the two command lines share."""

import torch

from demo_recipe.errors import RecipeError


def pick_device(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` as a device; auto takes a GPU if there is one.

    Raises:
        RecipeError: the name is unknown or the GPU is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise RecipeError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise RecipeError(f"--device {name} is not there, got {count} GPUs; pass --device cpu")
    return torch.device(name)
