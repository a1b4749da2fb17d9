"""Where models come from: demo, diffusers folders, Hub ids, original DiT files, random weights."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from ...errors import InputError
from ..model import DiffusionModel

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_STATE_DICT_SUFFIXES = (".pt", ".pth", ".ckpt")


def load_model(
    source: str | None = None,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    blocks: int | None = None,
) -> DiffusionModel:
    """Load a full-precision model in float32, in eval mode and without gradients.

    What `source` may be:

    1. None or 'demo': the embedded class-conditional CIFAR-10 model;
    2. 'random:DiT-XL/2' and the other published shapes: random weights, decided by `seed`;
    3. a diffusers folder (`transformer/`, `scheduler/`, optionally `vae/`), or its transformer
       folder;
    4. a facebookresearch/DiT state dict (`.pt`);
    5. a Hub id ('facebook/DiT-XL-2-256'), where no file of that name exists.

    `blocks` keeps the first so many transformer blocks. Equal embedders of the blocks are tied.
    Raises `InputError` for anything that cannot be loaded.
    """
    from . import demo, diffusers_folder, hub, original_dit, random_dit

    if source is None or source == "demo":
        return demo.load(device=device, blocks=blocks)
    if source.startswith(random_dit.PREFIX):
        return random_dit.load(source, device=device, seed=seed, blocks=blocks)
    path = Path(source).expanduser()
    if path.is_dir():
        return diffusers_folder.load(path, device=device, blocks=blocks)
    if path.is_file() and path.suffix in _STATE_DICT_SUFFIXES:
        return original_dit.load(path, device=device, blocks=blocks)
    if not path.exists() and _HUB_ID.fullmatch(source):
        return hub.load(source, device=device, blocks=blocks)
    raise InputError(
        f"no model at {source!r}: give 'demo', a diffusers folder, a DiT state dict (.pt), "
        f"a Hub id such as facebook/DiT-XL-2-256, or {random_dit.PREFIX}DiT-XL/2"
    )
