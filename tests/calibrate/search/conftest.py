"""Linears of a small DiT as the search sees them, without a model."""

from __future__ import annotations

import pytest

from qdit.calibrate.plan import LinearSpec, Role

_LAYERS: tuple[tuple[str, Role, int, int, str], ...] = (
    ("norm1.linear", "adaln", 1, 6, "norm1.linear"),
    ("attn1.to_q", "attention_qkv", 1, 1, "attn1"),
    ("attn1.to_k", "attention_qkv", 1, 1, "attn1"),
    ("attn1.to_v", "attention_qkv", 1, 1, "attn1"),
    ("attn1.to_out.0", "attention_out", 1, 1, "attn1.to_out.0"),
    ("ff.net.0.proj", "mlp_in", 1, 4, "ff.net.0.proj"),
    ("ff.net.2", "mlp_out", 4, 1, "ff.net.2"),
)


def dit_linears(width: int, blocks: int = 1) -> list[LinearSpec]:
    """The linears of a DiT of this hidden size, as `DiTFamily.linears` names them."""
    return [
        LinearSpec(
            name=f"transformer_blocks.{block}.{path}",
            role=role,
            block=block,
            in_features=k * width,
            out_features=n * width,
            has_bias=True,
            input_name=f"transformer_blocks.{block}.{source}.input",
        )
        for block in range(blocks)
        for path, role, k, n, source in _LAYERS
    ]


@pytest.fixture(scope="session")
def linears() -> list[LinearSpec]:
    """Two blocks of hidden size 192."""
    return dit_linears(192, blocks=2)
