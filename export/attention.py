"""Attention below opset 23, which has no Attention operator: two MatMuls around a Softmax."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset18 as op  # the oldest these operators have: torch converts upwards

ATTENTION_OPSET = 23


def translations(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Entries for `torch.onnx.export(custom_translation_table=…)`.

    torch's own decomposition transposes K through shapes computed at run time, eleven nodes that
    no runtime folds. From opset 23 on its translation is the Attention operator itself.
    """
    if opset >= ATTENTION_OPSET:
        return {}
    return {torch.ops.aten.scaled_dot_product_attention.default: _attention}


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(scale · QKᵀ) V for Q, K, V [B, H, T, D], without a mask; scale is 1/√D by default."""
    if attn_mask is not None or is_causal or dropout_p or enable_gqa:
        raise NotImplementedError("only plain attention is translated: no mask, no dropout, no GQA")
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scaled = op.Mul(query, op.CastLike(op.Constant(value_float=factor), query))
    scores = op.MatMul(scaled, op.Transpose(key, perm=[0, 1, 3, 2]))
    return op.MatMul(op.Softmax(scores, axis=-1), value)
