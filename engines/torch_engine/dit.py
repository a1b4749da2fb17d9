"""The DiT's forward pass on the kernels: what stands between the linears is fused into them.

A block is eight launches and attention: normalize, modulate and quantize; q, k, v; attention;
quantize; the output product with its gate and residual; normalize, modulate and quantize; the first
product of the MLP; GELU and quantize; the second product with its gate and residual. All blocks'
adaLN modulations come from one product where their embedders are one module (as in every published
DiT) and their schemes agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...calibrate.families.base import Family
from ...calibrate.families.dit import DiTFamily
from ...calibrate.plan import LinearSpec
from ...errors import InputError
from ..kernels.operands import Gate, Modulation
from ..kernels.variants import Gelu
from .linears import LinearBuilder, Linears, Part
from .source import Source

_GELU: dict[str, Gelu] = {"gelu-approximate": "tanh", "gelu": "exact"}
_FIRST_EPSILON = 1e-6  # of adaLN-zero's own normalization; the MLP's is the config's


class FusedBlock(nn.Module):
    """One transformer block: hidden [M, D] → [M, D], M = images · tokens."""

    def __init__(
        self, linears: dict[str, Linears], heads: int, epsilons: tuple[float, float], gelu: Gelu
    ) -> None:
        super().__init__()
        self.attention_in = linears["attention_qkv"]
        self.attention_out = linears["attention_out"]
        self.mlp_in = linears["mlp_in"]
        self.mlp_out = linears["mlp_out"]
        self._heads = heads
        self._epsilons = epsilons
        self._gelu = gelu

    def forward(self, hidden: Tensor, modulation: Tensor) -> Tensor:
        """`modulation` [images, 6D]: shift, scale and gate of attention, then of the MLP."""
        tokens = len(hidden) // len(modulation)
        dtype = hidden.dtype
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation.chunk(6, dim=1)
        source = Source(hidden, Modulation(shift, scale, tokens, self._epsilons[0]))
        attended = self._attend(self.attention_in(source, dtype), tokens)
        hidden = self.attention_out.gate_into(Source(attended), Gate(hidden, gate, tokens), dtype)
        source = Source(hidden, Modulation(mlp_shift, mlp_scale, tokens, self._epsilons[1]))
        (inner,) = self.mlp_in(source, dtype)
        return self.mlp_out.gate_into(
            Source(inner, gelu=self._gelu), Gate(hidden, mlp_gate, tokens), dtype
        )

    def _attend(self, projections: list[Tensor], tokens: int) -> Tensor:
        """Softmax(q kᵀ / √d) v over each image, [M, D] from q, k and v [M, D]."""
        query, key, value = (
            part.unflatten(0, (-1, tokens)).unflatten(2, (self._heads, -1)).transpose(1, 2)
            for part in projections
        )
        attended = functional.scaled_dot_product_attention(query, key, value)
        return attended.transpose(1, 2).flatten(2).flatten(0, 1).contiguous()


class FusedDiT(nn.Module):
    """The whole denoiser: (hidden_states, timestep, class_labels) → raw output, as the family's.

    `skeleton` is the denoiser without its quantized weights; its embedders and its final layer run
    as they are, in `dtype`.
    """

    def __init__(
        self,
        family: Family,
        skeleton: nn.Module,
        builder: LinearBuilder,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        if not isinstance(family, DiTFamily):
            raise InputError(
                f"the torch engine runs models of family dit, got {family.name}; use the engine "
                "onnxruntime"
            )
        self._family = family
        self._dtype = dtype
        own: Any = skeleton
        config = own.config
        linears = family.linears(skeleton)
        depth = len(family.blocks(skeleton))
        self._modulations = AdaLN(skeleton, linears, builder, depth)
        epsilons = (_FIRST_EPSILON, config.norm_eps)
        gelu = _GELU[config.activation_fn]
        self.blocks = nn.ModuleList(
            FusedBlock(
                _linears_of_block(linears, block, builder),
                config.num_attention_heads,
                epsilons,
                gelu,
            )
            for block in range(depth)
        )
        self._outside = _without_linears(skeleton, linears).to(device=device, dtype=dtype)

    @property
    def weight_bytes(self) -> int:
        """Bytes of everything that stays on the device, shared modules counted once."""
        parts = [module for module in self.modules() if isinstance(module, Part)]
        held = {id(value): value for value in (*self.parameters(), *self.buffers())}
        plain = sum(value.numel() * value.element_size() for value in held.values())
        return plain + sum(part.packed_bytes for part in parts)

    @torch.no_grad()
    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """[B, C, H, W], [B], [B] → [B, out channels, H, W] in the engine's dtype."""
        outside: Any = self._outside
        inputs = (hidden_states.to(self._dtype), timestep, class_labels)
        start = self._family.before_blocks(outside, *inputs)
        modulations = self._modulations(outside, timestep, class_labels, self._dtype)
        images, tokens, _ = start.hidden_states.shape
        hidden = start.hidden_states.flatten(0, 1).contiguous()
        for block, modulation in zip(self.blocks, modulations, strict=True):
            hidden = block(hidden, modulation)
        blocks_out = hidden.unflatten(0, (images, tokens))
        return self._family.after_blocks(outside, replace(start, hidden_states=blocks_out))


class AdaLN(nn.Module):
    """The modulations of all blocks, [B, 6D] each, from the timestep's and label's embedding."""

    def __init__(
        self, skeleton: nn.Module, linears: Sequence[LinearSpec], builder: LinearBuilder, depth: int
    ) -> None:
        super().__init__()
        own = [spec for spec in linears if spec.role == "adaln"]
        model: Any = skeleton
        embedders = {id(block.norm1.emb) for block in model.transformer_blocks}
        groups = [own] if len(embedders) == 1 else [[spec] for spec in own]
        self.groups = nn.ModuleList(builder.build(group) for group in groups)
        self._blocks = [[spec.block for spec in group] for group in groups]
        self._depth = depth

    def forward(
        self, outside: Any, timestep: Tensor, class_labels: Tensor, dtype: torch.dtype
    ) -> list[Tensor]:
        made: list[Tensor] = [torch.empty(0)] * self._depth
        for group, blocks in zip(self.groups, self._blocks, strict=True):
            embedder = outside.transformer_blocks[blocks[0]].norm1.emb
            embedding = functional.silu(embedder(timestep, class_labels, hidden_dtype=dtype))
            for block, modulation in zip(blocks, group(Source(embedding), dtype), strict=True):
                made[block] = modulation
        return made


def _linears_of_block(
    linears: Sequence[LinearSpec], block: int, builder: LinearBuilder
) -> dict[str, Linears]:
    own = [spec for spec in linears if spec.block == block and spec.role != "adaln"]
    roles = dict.fromkeys(spec.role for spec in own)
    return {role: builder.build([spec for spec in own if spec.role == role]) for role in roles}


def _without_linears(skeleton: nn.Module, linears: Sequence[LinearSpec]) -> nn.Module:
    """The skeleton with nothing in the place of its blocks' linears, which live in products."""
    for spec in linears:
        parent, _, child = spec.name.rpartition(".")
        setattr(skeleton.get_submodule(parent), child, nn.Identity())
    return skeleton
