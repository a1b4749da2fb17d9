"""Models in diffusers' folder layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...errors import InputError
from ..families import family_of
from ..model import DiffusionModel, ModelSource
from .assemble import assemble, config_of
from .schedulers import default_scheduler_config
from .vae import load_vae
from .weight_files import read_json, read_tensors, sha256_of_files, weight_files


def load(folder: Path, *, device: torch.device | str, blocks: int | None) -> DiffusionModel:
    """Load `transformer/`, `scheduler/` and `vae/` (optional) of a folder, or a transformer folder.

    A transformer folder takes the scheduler and VAE that lie beside it; without a scheduler it gets
    the one of facebook/DiT-XL-2-256. Classes are named by `id2label` in model_index.json.
    """
    folder = location = folder.resolve()
    transformer = folder / "transformer"
    if not transformer.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(
                f"{folder} holds neither transformer/ nor config.json; "
                f"give a diffusers folder of a DiT"
            )
        transformer, folder = folder, folder.parent
    config = read_json(transformer / "config.json")
    family = family_of(config)
    files = weight_files(transformer)
    denoiser = assemble(
        family,
        config,
        read_tensors(files),
        where=str(transformer),
        device=device,
        blocks=blocks,
    )
    vae = load_vae(folder / "vae", device)
    if vae is not None:
        files = [*files, *weight_files(folder / "vae")]
    return DiffusionModel(
        name=folder.name if transformer.name == "transformer" else transformer.name,
        source=ModelSource("diffusers", str(location), sha256_of_files(files)),
        family=family,
        denoiser=denoiser,
        config=config_of(denoiser),
        scheduler_config=_scheduler_config(folder),
        vae=vae,
        class_names=_class_names(folder),
    )


def _scheduler_config(folder: Path) -> dict[str, Any]:
    path = folder / "scheduler" / "scheduler_config.json"
    return read_json(path) if path.is_file() else default_scheduler_config()


def _class_names(folder: Path) -> tuple[str, ...]:
    path = folder / "model_index.json"
    labels = read_json(path).get("id2label") if path.is_file() else None
    if not isinstance(labels, dict):
        return ()
    return tuple(str(labels.get(str(index), "")) for index in range(len(labels)))
