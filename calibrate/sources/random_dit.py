"""`random:DiT-XL/2`: random weights at a published DiT's real shape, for benchmarks."""

from __future__ import annotations

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ..families import family_of
from ..model import DiffusionModel, ModelSource
from .assemble import build_empty, config_of, fill_parameters
from .schedulers import default_scheduler_config

PREFIX = "random:"

# Table 1 of the DiT paper: depth, heads, channels a head. Each comes with patch 2, 4 and 8.
SHAPES = {
    "DiT-XL": (28, 16, 72),
    "DiT-L": (24, 16, 64),
    "DiT-B": (12, 12, 64),
    "DiT-S": (12, 6, 64),
}
NAMES = tuple(f"{size}/{patch}" for size in SHAPES for patch in (2, 4, 8))

_BIAS_STD = 0.02
_EMBEDDING_STD = 0.5
_MODULATION_GAIN = 0.5


def load(
    source: str, *, device: torch.device | str, seed: int, blocks: int | None
) -> DiffusionModel:
    """Random weights, decided by `seed` and each parameter's name alone.

    So the first N blocks are the same ones whatever `blocks` is. Weights are normal with variance
    1/K, which keeps each linear's output as large as its input; adaLN linears are drawn smaller
    but not zero, as a freshly initialised DiT would have them: adaLN-zero makes every block the
    identity and all activations equal. With these, shifts, scales and gates have a standard
    deviation of about 0.2, label and timestep both tell, and the hidden states keep their scale
    through the depth. A trained DiT's outlier channels are not imitated.

    Latents are 32×32×4 (256×256 images), sigma is learned, classes are ImageNet's 1000.
    Raises `InputError` for a name not in `NAMES`.
    """
    config = config_named(source.removeprefix(PREFIX))
    family = family_of(config)
    denoiser = build_empty(family, config)
    if blocks is not None:
        family.keep_blocks(denoiser, blocks)
    family.tie_shared_modules(denoiser)
    shapes = {name: parameter.shape for name, parameter in denoiser.named_parameters()}
    with ThreadPoolExecutor() as pool:  # torch draws outside the interpreter's lock
        drawn = pool.map(lambda name: _draw(name, shapes[name], seed), shapes)
        values = dict(zip(shapes, drawn, strict=True))
    fill_parameters(denoiser, lambda name, _: values.pop(name))
    denoiser.to(device)
    return DiffusionModel(
        name=source,
        source=ModelSource("random", source, "", seed),
        family=family,
        denoiser=denoiser,
        config=config_of(denoiser),
        scheduler_config=default_scheduler_config(),
    )


def config_named(name: str) -> dict[str, Any]:
    """The diffusers config of a published shape ('DiT-XL/2'), at 256×256 with learned sigma."""
    if name not in NAMES:
        raise InputError(f"random models are {', '.join(NAMES)}; got {name!r}")
    size, _, patch = name.partition("/")
    depth, heads, head_channels = SHAPES[size]
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_layers": depth,
        "num_attention_heads": heads,
        "attention_head_dim": head_channels,
        "patch_size": int(patch),
        "sample_size": 32,
        "in_channels": 4,
        "out_channels": 8,
        "num_embeds_ada_norm": 1000,
    }


def _draw(name: str, shape: torch.Size, seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    if len(shape) == 1:
        std = _BIAS_STD
    elif "embedding_table" in name:
        std = _EMBEDDING_STD
    else:
        std = 1 / math.sqrt(math.prod(shape[1:]))
        std *= _MODULATION_GAIN if name.endswith("norm1.linear.weight") else 1.0
    return torch.empty(shape).normal_(0.0, std, generator=generator)
