"""Class-conditional DiT (Peebles & Xie, arXiv 2212.09748): diffusers' `DiTTransformer2DModel`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import InputError
from ..diffusers_logs import silence_needless_warnings
from ..plan import LinearSpec, Role
from .base import BlockInputs, Family, InputSpec, SmoothingSite

TIMESTEPS = 1000  # training timesteps of every published DiT: 0 … 999

# What a config may say, and what diffusers takes where it is silent.
_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "upcast_attention": False,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
}
_COUNTS = (
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
    "num_layers",
    "sample_size",
    "patch_size",
    "num_embeds_ada_norm",
)
_ACTIVATIONS = ("gelu-approximate", "gelu")

# qdit's own key. Frequencies of the timestep embedding are 10000^(-i / (128 - shift)): diffusers
# fixes the shift at 1, facebookresearch/DiT trained its models with 0. A converted checkpoint must
# say so or its timesteps would be read at slightly wrong frequencies.
FREQUENCY_SHIFT = "timestep_downscale_freq_shift"


class DiTFamily:
    """DiT with adaLN-zero blocks. Inputs: hidden_states [B, C, H, W], timestep [B], label [B].

    Sizes come from the config and not from the linears, so every method works just as well when
    those were replaced by their quantized simulation or lie on the meta device.
    """

    name = "dit"
    output_name = "sample"
    class_names: tuple[str, ...] = ("DiTTransformer2DModel",)

    def matches(self, config: dict[str, Any]) -> bool:
        """DiT by its own name, or by the old one that facebook/DiT-XL-2-256 still carries."""
        class_name = config.get("_class_name")
        old_name = class_name == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero"
        return class_name in self.class_names or old_name

    def build(self, config: dict[str, Any]) -> nn.Module:
        """A `DiTTransformer2DModel` in eval mode (labels are not dropped), without gradients.

        Keys of old configs that mean nothing to a DiT are left out. Raises `InputError` for values
        that no DiT can have.
        """
        from diffusers import DiTTransformer2DModel  # seconds to import: only when a model is made

        silence_needless_warnings()
        known = _checked(config)
        shift = known.pop(FREQUENCY_SHIFT)
        denoiser: Any = DiTTransformer2DModel(**known).eval().requires_grad_(False)
        denoiser.register_to_config(**{FREQUENCY_SHIFT: shift})
        for block in self.blocks(denoiser):
            block.norm1.emb.time_proj.downscale_freq_shift = shift
        if denoiser.pos_embed.pos_embed.is_meta:
            grid = known["sample_size"] // known["patch_size"]
            denoiser.pos_embed.pos_embed = position_table(denoiser.inner_dim, grid)
        module: nn.Module = denoiser
        return module

    def tie_shared_modules(self, denoiser: nn.Module) -> None:
        """Let all blocks share one timestep/label embedder, if theirs are equal."""
        embedders = [block.norm1.emb for block in self.blocks(denoiser)]
        if all(_holds_equal_weights(embedders[0], other) for other in embedders[1:]):
            for block in self.blocks(denoiser):
                block.norm1.emb = embedders[0]

    def keep_blocks(self, denoiser: nn.Module, count: int) -> None:
        """Drop all blocks after the first `count`, 1 … depth."""
        model: Any = denoiser  # diffusers' attributes are unknown to nn.Module's types
        depth = len(model.transformer_blocks)
        if not 1 <= count <= depth:
            raise InputError(f"blocks must be between 1 and the model's {depth}, got {count}")
        model.transformer_blocks = model.transformer_blocks[:count]
        model.register_to_config(num_layers=count)

    def blocks(self, denoiser: nn.Module) -> Sequence[Any]:
        """The transformer blocks in order (an `nn.ModuleList`)."""
        model: Any = denoiser
        blocks: Sequence[Any] = model.transformer_blocks
        return blocks

    def linears(self, denoiser: nn.Module) -> list[LinearSpec]:
        """The seven linears of each block in the order they run; q, k and v share one input."""
        config: Any = denoiser.config
        width = config.num_attention_heads * config.attention_head_dim
        bias = config.attention_bias
        layers: tuple[tuple[str, Role, int, int, bool, str], ...] = (
            ("norm1.linear", "adaln", width, 6 * width, True, "norm1.linear"),
            ("attn1.to_q", "attention_qkv", width, width, bias, "attn1"),
            ("attn1.to_k", "attention_qkv", width, width, bias, "attn1"),
            ("attn1.to_v", "attention_qkv", width, width, bias, "attn1"),
            ("attn1.to_out.0", "attention_out", width, width, True, "attn1.to_out.0"),
            ("ff.net.0.proj", "mlp_in", width, 4 * width, True, "ff.net.0.proj"),
            ("ff.net.2", "mlp_out", 4 * width, width, True, "ff.net.2"),
        )
        return [
            LinearSpec(
                name=f"transformer_blocks.{block}.{path}",
                role=role,
                block=block,
                in_features=in_features,
                out_features=out_features,
                has_bias=has_bias,
                input_name=f"transformer_blocks.{block}.{source}.input",
            )
            for block in range(len(self.blocks(denoiser)))
            for path, role, in_features, out_features, has_bias, source in layers
        ]

    def smoothing_sites(self, denoiser: nn.Module) -> list[SmoothingSite]:
        """Two a block: what q, k and v read, and what the MLP's first linear reads.

        adaLN's rows are shift, scale and gate of attention, then shift, scale and gate of the MLP.
        """
        config: Any = denoiser.config
        width = config.num_attention_heads * config.attention_head_dim

        def rows(part: int) -> slice:
            return slice(part * width, (part + 1) * width)

        readers = (
            ("attn1", 0, ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
            ("ff.net.0.proj", 3, ("ff.net.0.proj",)),
        )
        return [
            SmoothingSite(
                input_name=f"{path}.{source}.input",
                modulation=f"{path}.norm1.linear",
                shift_rows=rows(part),
                scale_rows=rows(part + 1),
                consumers=tuple(f"{path}.{name}" for name in names),
            )
            for path in (f"transformer_blocks.{i}" for i in range(len(self.blocks(denoiser))))
            for source, part, names in readers
        ]

    def inputs(self, denoiser: nn.Module) -> tuple[InputSpec, ...]:
        config: Any = denoiser.config
        size = config.sample_size
        return (
            InputSpec("hidden_states", torch.float32, (config.in_channels, size, size)),
            InputSpec("timestep", torch.int64, ()),
            InputSpec("class_labels", torch.int64, ()),
        )

    def example_inputs(
        self, denoiser: nn.Module, batch: int, generator: torch.Generator
    ) -> tuple[Tensor, ...]:
        """Normal noise, timesteps 0 … 999, labels with the null label among them."""
        shape = (batch, *self.inputs(denoiser)[0].shape)
        labels = self.class_count(denoiser) + 1
        return (
            torch.randn(shape, generator=generator),
            torch.randint(TIMESTEPS, (batch,), generator=generator),
            torch.randint(labels, (batch,), generator=generator),
        )

    def forward(self, denoiser: nn.Module, *inputs: Tensor) -> Tensor:
        """Raw output [B, out channels, H, W] in the denoiser's dtype; the input is cast to it."""
        hidden_states, timestep, class_labels = inputs
        output: Tensor = denoiser(
            hidden_states.to(_dtype(denoiser)),
            timestep=timestep,
            class_labels=class_labels,
            return_dict=False,
        )[0]
        return output

    def before_blocks(self, denoiser: nn.Module, *inputs: Tensor) -> BlockInputs:
        """The patch embedding [B, T, D]; each block embeds timestep and label itself."""
        hidden_states, timestep, class_labels = inputs
        model: Any = denoiser
        patches = model.pos_embed(hidden_states.to(_dtype(denoiser)))
        return BlockInputs(patches, {"timestep": timestep, "class_labels": class_labels})

    def run_block(self, block: nn.Module, inputs: BlockInputs) -> Tensor:
        output: Tensor = block(inputs.hidden_states, **inputs.shared)
        return output

    def after_blocks(self, denoiser: nn.Module, inputs: BlockInputs) -> Tensor:
        """The final adaLN layer and the way back from patches to [B, out channels, H, W]."""
        model: Any = denoiser
        hidden = inputs.hidden_states
        embedding = model.transformer_blocks[0].norm1.emb(
            inputs.shared["timestep"], inputs.shared["class_labels"], hidden_dtype=hidden.dtype
        )
        shift, scale = model.proj_out_1(functional.silu(embedding)).chunk(2, dim=1)
        patches = model.proj_out_2(model.norm_out(hidden) * (1 + scale[:, None]) + shift[:, None])
        grid, size = math.isqrt(patches.shape[1]), model.config.patch_size
        square = patches.unflatten(2, (size, size, -1)).unflatten(1, (grid, grid))
        # [B, rows, columns, row in patch, column in patch, C] → [B, C, H, W]
        output: Tensor = square.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
        return output

    def noise_prediction(self, denoiser: nn.Module, output: Tensor) -> Tensor:
        """The first C of C or 2C output channels: a learned sigma is dropped."""
        config: Any = denoiser.config
        return output[:, : config.in_channels]

    def null_label(self, denoiser: nn.Module) -> int:
        """The row after the last class in the label embedding."""
        return self.class_count(denoiser)

    def class_count(self, denoiser: nn.Module) -> int:
        config: Any = denoiser.config
        return int(config.num_embeds_ada_norm)


def _dtype(denoiser: nn.Module) -> torch.dtype:
    model: Any = denoiser
    dtype: torch.dtype = model.pos_embed.proj.weight.dtype  # never quantized, never replaced
    return dtype


def _holds_equal_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have equal parameters, by name; meta tensors count as equal."""
    if one is other:
        return True
    first, second = dict(one.named_parameters()), dict(other.named_parameters())
    return first.keys() == second.keys() and all(
        value.is_meta or torch.equal(value, second[name]) for name, value in first.items()
    )


def position_table(width: int, grid: int) -> Tensor:
    """The fixed sin-cos embedding [1, grid², width] of a square grid, as diffusers computes it."""
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    with torch.device("cpu"):
        table: Tensor = get_2d_sincos_pos_embed(width, grid, base_size=grid, output_type="pt")
    return table.float().unsqueeze(0)


def _checked(config: dict[str, Any]) -> dict[str, Any]:
    """The keys that a DiT understands, defaults filled in. Raises `InputError`."""
    known = {key: config.get(key, default) for key, default in _DEFAULTS.items()}
    known[FREQUENCY_SHIFT] = config.get(FREQUENCY_SHIFT, 1)
    if known["out_channels"] is None:
        known["out_channels"] = known["in_channels"]
    for key in _COUNTS:
        value = known[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"a DiT config's {key} must be a positive integer, got {value!r}")
    _check_choice("norm_type", known["norm_type"], ("ada_norm_zero",))
    _check_choice("activation_fn", known["activation_fn"], _ACTIVATIONS)
    _check_choice(FREQUENCY_SHIFT, known[FREQUENCY_SHIFT], (0, 1))
    channels = known["in_channels"]
    _check_choice("out_channels", known["out_channels"], (channels, 2 * channels))
    if known["sample_size"] % known["patch_size"]:
        raise InputError(
            f"a DiT config's patch_size must divide sample_size {known['sample_size']}, "
            f"got {known['patch_size']}"
        )
    return known


def _check_choice(key: str, value: object, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        choices = " or ".join(str(choice) for choice in allowed)
        raise InputError(f"a DiT config's {key} must be {choices}, got {value!r}")


FAMILY: Family = DiTFamily()
