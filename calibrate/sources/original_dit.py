"""State dicts of the original repository, facebookresearch/DiT, under diffusers' names.

The mapping, with D the hidden size, and what differs between the two implementations:

1. `attn.qkv` [3D, D] stacks q, k and v → `to_q`, `to_k`, `to_v` (views of the same memory).
2. One `t_embedder` and `y_embedder` serve all blocks; diffusers keeps one in each → tied.
3. Modulation chunks (shift, scale, gate; attention first) and the final layer's (shift, scale) come
   in the same order, and so do patch pixels and channels: those weights move as they are.
4. All LayerNorms there have eps 1e-6; diffusers' MLP norm follows `norm_eps`, so that is set.
5. Timestep frequencies there are 10000^(-i/128); diffusers' are 10000^(-i/127) unless the config
   says otherwise (`families/dit.py`), so it does.
6. `pos_embed` is stored there and computed in diffusers: compared, then dropped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ..families import family_of
from ..families.dit import FREQUENCY_SHIFT, position_table
from ..model import DiffusionModel, ModelSource
from .assemble import assemble, check_names, config_of
from .schedulers import default_scheduler_config
from .vae import load_vae
from .weight_files import sha256_of_files, weight_files
from .weights_only import read_pickled

# Which entry of a training checkpoint is used: sampling is done with the averaged weights.
WRAPPERS = ("ema", "model", "state_dict")

# Heads are not visible in the shapes: they are those of DiT-S, B, L and XL.
HEADS_OF_WIDTH = {384: 6, 768: 12, 1024: 16, 1152: 16}

# The averaged weights' pos_embed has passed through ~400k float32 updates of itself.
POSITION_TOLERANCE = 1e-3

_BLOCK_KEYS = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
_EMBEDDER_KEYS = {
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight",
}
_OTHER_KEYS = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}


def load(path: Path, *, device: torch.device | str, blocks: int | None) -> DiffusionModel:
    """Load a `.pt` of facebookresearch/DiT, bare or from its training script.

    The config is inferred from the shapes; the scheduler is that of facebook/DiT-XL-2-256; a VAE
    is taken from `vae/` beside the file. Raises `InputError` unless every key is used exactly once
    and none is missing.
    """
    state = _unwrap(read_pickled(path), path)
    config = infer_config(state, path)
    family = family_of(config)
    denoiser = assemble(
        family, config, convert(state, path), where=str(path), device=device, blocks=blocks
    )
    files = [path]
    vae = load_vae(path.parent / "vae", device)
    if vae is not None:
        files += weight_files(path.parent / "vae")
    return DiffusionModel(
        name=path.stem,
        source=ModelSource("original-dit", str(path.resolve()), sha256_of_files(files)),
        family=family,
        denoiser=denoiser,
        config=config_of(denoiser),
        scheduler_config=default_scheduler_config(),
        vae=vae,
    )


def infer_config(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """The diffusers config of an original state dict, from its tensors' shapes.

    Patches are embedded by a [D, C, p, p] convolution and put out by a [p·p·outC, D] linear;
    `pos_embed` is [1, T, D]; the label table has a row for the null label beside the classes.
    """
    width, channels, patch, _ = _shape(state, "x_embedder.proj.weight", 4, path)
    _, tokens, _ = _shape(state, "pos_embed", 3, path)
    rows, _ = _shape(state, "y_embedder.embedding_table.weight", 2, path)
    outputs, _ = _shape(state, "final_layer.linear.weight", 2, path)
    if width not in HEADS_OF_WIDTH:
        known = ", ".join(str(size) for size in HEADS_OF_WIDTH)
        raise InputError(f"a DiT's hidden size must be one of {known}, got {width} in {path}")
    heads = HEADS_OF_WIDTH[width]
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_layers": _depth(state),
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": outputs // patch**2,
        "patch_size": patch,
        "sample_size": math.isqrt(tokens) * patch,
        "num_embeds_ada_norm": rows - 1,
        "norm_eps": 1e-6,
        FREQUENCY_SHIFT: 0,
    }


def convert(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The state dict under diffusers' names: views, no copies."""
    depth = _depth(state)
    check_names(_expected_keys(depth), state, str(path))
    _check_positions(state["pos_embed"], path)
    converted = dict(_converted_others(state))
    for block in range(depth):
        converted.update(_converted_block(state, block, path))
    return converted


def _converted_others(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for old, new in _OTHER_KEYS.items():
        for kind in ("weight", "bias"):
            yield f"{new}.{kind}", state[f"{old}.{kind}"]


def _converted_block(
    state: Mapping[str, Tensor], block: int, path: Path
) -> Iterator[tuple[str, Tensor]]:
    old_prefix, new_prefix = f"blocks.{block}", f"transformer_blocks.{block}"
    for kind in ("weight", "bias"):
        name = f"{old_prefix}.attn.qkv.{kind}"
        if state[name].shape[0] % 3:
            raise InputError(
                f"{name} must stack q, k and v, got {state[name].shape[0]} rows in {path}"
            )
        for target, part in zip(("to_q", "to_k", "to_v"), state[name].chunk(3), strict=True):
            yield f"{new_prefix}.attn1.{target}.{kind}", part
        for old, new in _BLOCK_KEYS.items():
            yield f"{new_prefix}.{new}.{kind}", state[f"{old_prefix}.{old}.{kind}"]
    for old, new in _EMBEDDER_KEYS.items():
        yield f"{new_prefix}.norm1.emb.{new}", state[old]


def _expected_keys(depth: int) -> set[str]:
    linears = [*_OTHER_KEYS]
    for block in range(depth):
        linears += [f"blocks.{block}.{name}" for name in ("attn.qkv", *_BLOCK_KEYS)]
    pairs = {f"{name}.{kind}" for name in linears for kind in ("weight", "bias")}
    return pairs | set(_EMBEDDER_KEYS) | {"pos_embed"}


def _check_positions(given: Tensor, path: Path) -> None:
    """Raise unless `given` [1, T, D] is the sin-cos table of a square grid."""
    _, tokens, width = given.shape
    grid = math.isqrt(tokens)
    if grid * grid != tokens:
        raise InputError(f"pos_embed must cover a square of patches, got {tokens} in {path}")
    difference = (given.float() - position_table(width, grid)).abs().max().item()
    if not difference <= POSITION_TOLERANCE:  # NaN must not pass
        raise InputError(
            f"pos_embed must be DiT's sin-cos table within {POSITION_TOLERANCE}, "
            f"got a difference of {difference:.3g} in {path}; learned positions are not supported"
        )


def _unwrap(value: dict[str, Any], path: Path) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if isinstance(value.get(wrapper), dict):
            value = value[wrapper]
            break
    for name, tensor in value.items():
        if not isinstance(tensor, Tensor):
            raise InputError(f"{name} must be a tensor, got {type(tensor).__name__} in {path}")
    return value


def _depth(state: Mapping[str, Tensor]) -> int:
    found = (re.match(r"blocks\.(\d+)\.", name) for name in state)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _shape(state: Mapping[str, Tensor], name: str, rank: int, path: Path) -> tuple[int, ...]:
    if name not in state:
        raise InputError(f"{path} is not a facebookresearch/DiT state dict: it lacks {name}")
    shape = tuple(state[name].shape)
    if len(shape) != rank:
        raise InputError(f"{name} must have {rank} dimensions, got {list(shape)} in {path}")
    return shape
