"""BitOps of one linear, scale arithmetic counted: the arithmetic that a plan asks for.

A multiply-add of an a-bit by a b-bit number counts a·b bit operations, as in the literature on
mixed precision; 16-bit sides count 16. Beyond that literature, what groups cost is counted too.
"""

from __future__ import annotations

from math import lcm

from ..plan import LinearSpec
from ..schemes import LARGEST_MULTIPLIER, LayerScheme

# Partial sums, and the scales made at run time, are 32 bits wide.
_ACCUMULATOR_BITS = 32
_MULTIPLIER_BITS = LARGEST_MULTIPLIER.bit_length()
_SCALE_BITS = {"float16": 16, "float32": 32}


def linear_bitops(spec: LinearSpec, scheme: LayerScheme, rows: int) -> float:
    """Bit operations of y [rows, N] = x [rows, K] Wᵀ.

    1. Products: rows·N·K multiply-adds of b_w·b_a.
    2. Rescaling: the sum over K falls into segments that lie in one weight group and one
       activation group, K/g_w + K/g_a − K/lcm(g_w, g_a) of them. Each segment's sum is multiplied
       by the finer side's scale and added, and each group of the coarser side by that side's:
       multiply-adds of 32·(bits of the scale), 32 for a scale made at run time. With integer
       scales the weight groups' have 5 bits (1 … 16), and the whole sum is multiplied once by the
       channel's.
    3. Zero points: each asymmetric side costs one multiply-add of 32·(its bits) a segment.
    4. Quantizing the input: a division (32·32) for each of the rows·K values and K/g_a scales.
       Linears that share an input (q, k and v) count it each, since their groups may differ: an
       upper bound where they agree.
    """
    k, n = spec.in_features, spec.out_features
    products = float(rows * n * k * scheme.weight_bits * scheme.activation_bits)
    return products + rows * n * _rescaling(scheme, k) + rows * _quantizing(scheme, k)


def _rescaling(scheme: LayerScheme, k: int) -> int:
    """Bit operations a row and output, cases 2 and 3."""
    if not scheme.quantizes_weights:
        return 0
    scale_bits = _SCALE_BITS[scheme.scale_dtype]
    channel_bits = scale_bits if scheme.has_integer_scales else 0
    group_bits = _MULTIPLIER_BITS if scheme.has_integer_scales else scale_bits
    sides = [(scheme.weight_group_size(k), group_bits)]
    zero_points = 0 if scheme.weight_symmetric else scheme.weight_bits
    if scheme.quantizes_activations:
        sides.append((scheme.activation_group_size(k), _ACCUMULATOR_BITS))
        zero_points += 0 if scheme.activation_symmetric else scheme.activation_bits
    sizes = [size for size, _ in sides]
    segments = sum(k // size for size in sizes)
    if len(sizes) == 2:
        segments -= k // lcm(*sizes)  # K is a common multiple, so lcm divides it
    finer = min(range(len(sides)), key=sizes.__getitem__)
    scales = 0
    for side, (size, bits) in enumerate(sides):
        scales += (segments if side == finer else k // size) * bits
    return _ACCUMULATOR_BITS * (scales + channel_bits + segments * zero_points)


def _quantizing(scheme: LayerScheme, k: int) -> int:
    """Bit operations a row, case 4."""
    if not scheme.quantizes_activations:
        return 0
    return _ACCUMULATOR_BITS**2 * (k + k // scheme.activation_group_size(k))
