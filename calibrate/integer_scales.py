"""Group scales as small integers times one float a channel: ŵ = s[n]·m[n, g]·q[n, k].

q is the integer of b ≤ 4 bits that is stored, m an integer of 1 … 16 a group, s one float a
channel. q·m fits int8, so the weight is int8 with one scale a channel, and its product with int8
activations of one scale a token is a single int32 sum over K: the second level of QServe's
progressive quantization (arXiv 2405.04532, section 4.1), here symmetric, with s and m chosen for
the weights themselves instead of for weights that were rounded to int8 before.

s has at most 20 significant bits (float16 has 11), m five, of which the fifth only in the power of
two 16: so s·m is exact in float32 for every m, and s·m·q is the same number whether a runtime
multiplies the scales first or the integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .integers import IntegerRange, round_scale
from .schemes import LARGEST_MULTIPLIER, MULTIPLIER_BITS, LayerScheme, ScaleDtype

CHANNEL_SCALE_BITS = 24 - MULTIPLIER_BITS
# s is the channel's largest float scale over one of these. Smaller ones would only repeat them: the
# largest scale's multiples of 1/d are multiples of 1/2d too.
DIVISORS = tuple(range(LARGEST_MULTIPLIER // 2, LARGEST_MULTIPLIER + 1))


def round_channel_scale(scale: Tensor, dtype: ScaleDtype) -> Tensor:
    """Positive scales as they are stored, of `CHANNEL_SCALE_BITS` significant bits at most."""
    stored = round_scale(scale, dtype)
    mantissa, exponent = torch.frexp(stored)
    places = float(1 << CHANNEL_SCALE_BITS)
    return torch.ldexp(torch.round(mantissa * places) / places, exponent)


def is_channel_scale(scale: Tensor) -> bool:
    """Whether float32 holds every multiple 1 … 16 of the finite scales exactly."""
    single = scale.float()
    unused = single.view(torch.int32) & ((1 << MULTIPLIER_BITS) - 1)
    multiples = single * LARGEST_MULTIPLIER
    return not bool(unused.any()) and bool(multiples.isfinite().all())


def choose_channel_scale(
    groups: Tensor,
    scheme: LayerScheme,
    *,
    clipped: bool = False,
    importance: Tensor | None = None,
) -> Tensor:
    """s [N, 1], as it is stored, for weights `groups` [N, G, g] of any float dtype.

    Of the `DIVISORS` each channel takes the one that leaves it the least squared error once
    `choose_multipliers` has had its choice, each input weighted by `importance` [G, g] if given.
    """
    largest = _float_scales(groups, scheme).amax(dim=-1, keepdim=True)
    tried = [round_channel_scale(largest / d, scheme.scale_dtype) for d in DIVISORS]
    best_channel, best_error = tried[0], torch.full_like(largest, torch.inf)
    for channel in tried:
        _, errors = _multipliers_and_errors(groups, channel, scheme, clipped, importance)
        error = errors.sum(dim=-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_channel = torch.where(better, channel, best_channel)
    return best_channel


def choose_multipliers(
    groups: Tensor,
    channel: Tensor,
    scheme: LayerScheme,
    *,
    clipped: bool = False,
    importance: Tensor | None = None,
) -> Tensor:
    """m [N, G], as floats, of least squared error for weights `groups` [N, G, g] under the fixed
    scales `channel` [N, 1]; each input weighted by its `importance` [G, g] if given.

    1. The two multiples of s around the float scale max|w| / (2^(b−1) − 1) are tried.
    2. `clipped`: all of 1 … 16 are, as low as the least error takes them.

    No host reads a value, so that GPTQ's loop can be captured.
    """
    return _multipliers_and_errors(groups, channel, scheme, clipped, importance)[0]


def _multipliers_and_errors(
    groups: Tensor,
    channel: Tensor,
    scheme: LayerScheme,
    clipped: bool,
    importance: Tensor | None,
) -> tuple[Tensor, Tensor]:
    ratio = _float_scales(groups, scheme) / channel
    if clipped:
        tried = [torch.full_like(ratio, m) for m in range(1, LARGEST_MULTIPLIER + 1)]
    else:
        tried = [bound(ratio).clamp(1, LARGEST_MULTIPLIER) for bound in (torch.floor, torch.ceil)]
    best, best_errors = tried[0], torch.full_like(ratio, torch.inf)
    for multiplier in tried:
        errors = _errors(groups, channel * multiplier, scheme, importance)
        better = errors < best_errors
        best = torch.where(better, multiplier, best)
        best_errors = torch.where(better, errors, best_errors)
    return best, best_errors


def _float_scales(groups: Tensor, scheme: LayerScheme) -> Tensor:
    """max|w| / (2^(b−1) − 1) [N, G], not rounded."""
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    steps = IntegerRange.of(scheme.weight_bits, True).steps
    # a tensor: see `quantizers.range_parameters`
    return torch.maximum(-low, high).clamp(min=0) / low.new_full((), steps)


def _errors(
    groups: Tensor, scale: Tensor, scheme: LayerScheme, importance: Tensor | None
) -> Tensor:
    """Squared errors [N, G] of rounding groups [N, G, g] to multiples of scale [N, G]."""
    integers = IntegerRange.of(scheme.weight_bits, True)
    wide = scale.unsqueeze(-1)
    errors = torch.div(groups, wide).round_().clamp_(integers.low, integers.high)
    errors.mul_(wide).sub_(groups).square_()
    if importance is not None:
        errors.mul_(importance)
    return errors.sum(dim=-1)
