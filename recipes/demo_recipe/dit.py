"""The Diffusion Transformer of the demo: configuration, initialisation and the saved folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from demo_recipe.files import write_atomically, write_json

NULL_LABEL = 10
TRAIN_TIMESTEPS = 1000
BETA_START = 1e-4
BETA_END = 0.02

CONFIG: dict[str, Any] = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 64,
    "dropout": 0.0,
    "in_channels": 3,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_zero",
    "num_attention_heads": 4,
    "num_embeds_ada_norm": NULL_LABEL,
    "num_layers": 8,
    "out_channels": 3,
    "patch_size": 2,
    "sample_size": 32,
    "upcast_attention": False,
}

SCHEDULER_CONFIG: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": diffusers.__version__,
    "num_train_timesteps": TRAIN_TIMESTEPS,
    "beta_start": BETA_START,
    "beta_end": BETA_END,
    "beta_schedule": "linear",
    "clip_sample": True,
    "prediction_type": "epsilon",
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "timestep_spacing": "leading",
}


def build_model(seed: int, config: Mapping[str, Any] = CONFIG) -> DiTTransformer2DModel:
    """A DiT with one timestep/label embedder for all blocks, initialised adaLN-zero, in eval mode.

    In eval mode the embedder does not drop labels: the blocks would each drop their own. The
    trainer drops them once for the whole model. No other part differs between the two modes.
    """
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(**config)
    shared = model.transformer_blocks[0].norm1.emb
    for block in model.transformer_blocks:
        block.norm1.emb = shared
    _initialise(model)
    return model.eval()


def _initialise(model: DiTTransformer2DModel) -> None:
    """Xavier weights, zero biases, small embedders; zero modulations and output (Peebles 2023)."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.pos_embed.proj.weight.view(model.inner_dim, -1))
    nn.init.zeros_(model.pos_embed.proj.bias)
    embedder = model.transformer_blocks[0].norm1.emb
    for weight in (
        embedder.class_embedder.embedding_table.weight,
        embedder.timestep_embedder.linear_1.weight,
        embedder.timestep_embedder.linear_2.weight,
    ):
        nn.init.normal_(weight, std=0.02)
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
    nn.init.zeros_(model.proj_out_1.weight)
    nn.init.zeros_(model.proj_out_2.weight)


def save_model(model: DiTTransformer2DModel, folder: Path) -> None:
    """Write ``transformer/`` (fp16, every block with its embedder keys) and ``scheduler/``."""
    untied = DiTTransformer2DModel(**{key: model.config[key] for key in CONFIG})
    untied.load_state_dict({key: value.cpu() for key, value in model.state_dict().items()})
    untied = untied.half()
    write_atomically(folder / "transformer", untied.save_pretrained)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER_CONFIG)
