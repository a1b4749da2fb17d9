"""The VAE that lies beside a latent-space model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ...errors import InputError
from ..model import ModelSource
from .hub_files import fetch
from .weight_files import read_json
from .weights_only import first_line


def load_vae(folder: Path, device: torch.device | str) -> nn.Module | None:
    """The `AutoencoderKL` in `folder` in float32, or None where there is no such folder."""
    if not folder.is_dir():
        return None
    from diffusers import AutoencoderKL

    class_name = read_json(folder / "config.json").get("_class_name")
    if class_name != "AutoencoderKL":
        raise InputError(f"the VAE must be an AutoencoderKL, got {class_name!r} in {folder}")
    try:
        vae: nn.Module = AutoencoderKL.from_pretrained(
            folder, torch_dtype=torch.float32, local_files_only=True
        )
    except Exception as error:  # diffusers raises many kinds for a broken folder
        raise InputError(f"cannot load the VAE in {folder}: {first_line(error)}") from error
    return vae.eval().requires_grad_(False).to(device)


def vae_of_source(source: ModelSource, device: torch.device | str) -> nn.Module | None:
    """The VAE beside a model that was loaded before: of a folder, a `.pt` file or a Hub id.

    None where the model has none (the demo, random weights) or its place is gone.
    """
    if source.kind not in ("diffusers", "original-dit"):
        return None
    path = Path(source.location).expanduser()
    if path.is_dir():
        folder = path if (path / "transformer").is_dir() else path.parent
        return load_vae(folder / "vae", device)
    if path.is_file():
        return load_vae(path.parent / "vae", device)
    if not path.is_absolute():
        return load_vae(fetch(source.location) / "vae", device)
    return None
