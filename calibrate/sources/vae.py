"""The VAE that lies beside a latent-space model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ...errors import InputError
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
