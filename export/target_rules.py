"""Which schemes each target can express, layer by layer, and the nearest scheme where it cannot.

`onnxruntime/rules.py` has those of the ONNX Runtime target.

'Nearest' changes as little as it can, in this order: symmetric for asymmetric, a finer group, more
bits, and last a side left unquantized. It never takes fewer bits or a coarser group.

Facts marked [tested] are run by `tests/export/test_capabilities.py` against ONNX Runtime; the rest
is from NVIDIA's documentation, as `docs/targets.md` says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..calibrate.plan import LinearSpec
from ..calibrate.schemes import GROUP_SIZES, UNQUANTIZED_BITS, LayerScheme

# A reason why a scheme cannot be expressed, or None.
Rule = Callable[[LinearSpec, LayerScheme], str | None]
Nearest = Callable[[LinearSpec, LayerScheme], LayerScheme]

_UNQUANTIZED = LayerScheme(weight_bits=UNQUANTIZED_BITS, activation_bits=UNQUANTIZED_BITS)

# Coarser multiples repeat their scales over blocks of the smaller size.
_INT4_BLOCK = 64
_INT8_TENSOR_CORE_DEPTH = 32


def nothing_refused(spec: LinearSpec, scheme: LayerScheme) -> str | None:
    """`qdq`: standard operators express every scheme that a plan can hold. [tested]"""
    return None


def as_it_is(spec: LinearSpec, scheme: LayerScheme) -> LayerScheme:
    return scheme


def refuse_tensorrt_plugin(spec: LinearSpec, scheme: LayerScheme) -> str | None:
    """`tensorrt-plugin`: the plugins' own kernels, so every scheme but one kind of group.

    A tensor-core product is 32 channels deep, so a group must be a multiple of 32. [tested]
    """
    if not scheme.quantizes_weights:
        return None
    k = spec.in_features
    depth = _INT8_TENSOR_CORE_DEPTH
    sides = [("weight", scheme.weight_group_size(k))]
    if scheme.quantizes_activations:
        sides.append(("activation", scheme.activation_group_size(k)))
    for side, size in sides:
        if size % depth:
            return _not_multiple(side, size, depth)
    return None


def nearest_tensorrt_plugin(spec: LinearSpec, scheme: LayerScheme) -> LayerScheme:
    k, depth = spec.in_features, _INT8_TENSOR_CORE_DEPTH
    if k % depth:
        return _UNQUANTIZED
    made = scheme
    if scheme.weight_group_size(k) % depth:
        made = replace(made, weight_group=_finer_group(k, scheme.weight_group_size(k), depth))
    if scheme.activation_group_size(k) % depth:
        finer = _finer_group(k, scheme.activation_group_size(k), depth)
        made = replace(made, activation_group=finer)
    return made


def refuse_tensorrt_int8(spec: LinearSpec, scheme: LayerScheme) -> str | None:
    """`tensorrt-int8`: symmetric per-channel weights; symmetric 8-bit activations a token.

    The dynamic scales of the tokens are replaced by one calibrated scale a tensor, the one thing
    here that a plan cannot say (`Target.changes`). Integer scales make int8 weights with one scale
    a channel, so their groups are no hindrance. Weight-only layers are float products of the very
    values, whatever their groups. [tested]
    """
    if not scheme.quantizes_activations:
        return None
    if not _is_int8_by_channel(scheme):
        return (
            f"weights must have one scale a channel, got groups of {scheme.weight_group} with "
            "float scales; use --group-size channel"
        )
    if not scheme.weight_symmetric:
        return "weights must be symmetric"
    if scheme.activation_group != "token":
        return (
            "activations get one scale a tensor, far coarser than groups of "
            f"{scheme.activation_group}; use --activation-group-size token"
        )
    if scheme.activation_bits != 8 or not scheme.activation_symmetric:
        return "activations must be symmetric and have 8 bits"
    return None


def nearest_tensorrt_int8(spec: LinearSpec, scheme: LayerScheme) -> LayerScheme:
    """Weight-only where weights or activations have groups: one scale would be coarser."""
    if not _is_int8_by_channel(scheme) or scheme.activation_group != "token":
        return scheme.weight_only()
    return replace(scheme, weight_symmetric=True, activation_symmetric=True, activation_bits=8)


def refuse_tensorrt_int4(spec: LinearSpec, scheme: LayerScheme) -> str | None:
    """`tensorrt-int4`: weight-only, symmetric, 4 bits in blocks of 64 or 128.

    Integer scales come as their groups' factors s·m, whose 15 significant bits take float32.
    """
    if not scheme.quantizes_weights:
        return None
    if scheme.quantizes_activations:
        return "weights only: activations must stay at 16 bits"
    if scheme.weight_bits > 4:
        return f"weights have 4 bits at most, got {scheme.weight_bits}"
    if not scheme.weight_symmetric:
        return "weights must be symmetric"
    size = scheme.weight_group_size(spec.in_features)
    return _not_multiple("weight", size, _INT4_BLOCK) if size % _INT4_BLOCK else None


def nearest_tensorrt_int4(spec: LinearSpec, scheme: LayerScheme) -> LayerScheme:
    k = spec.in_features
    size = scheme.weight_group_size(k)
    if scheme.weight_bits > 4 or size < _INT4_BLOCK or k % _INT4_BLOCK:
        return _UNQUANTIZED
    made = replace(scheme.weight_only(), weight_symmetric=True)
    if size % _INT4_BLOCK:
        made = replace(made, weight_group=_finer_group(k, size, _INT4_BLOCK))
    return made


def _is_int8_by_channel(scheme: LayerScheme) -> bool:
    """Whether the weights are integers of 8 bits at most times one scale a channel."""
    return scheme.weight_group == "channel" or scheme.has_integer_scales


def _finer_group(k: int, size: int, multiple_of: int) -> int:
    """The largest group up to `size` that divides K and is a multiple; `multiple_of` divides K."""
    fitting = [g for g in GROUP_SIZES if g <= size and k % g == 0 and g % multiple_of == 0]
    return max(fitting, default=multiple_of)


def _not_multiple(side: str, size: int, of: int) -> str:
    return f"{side} groups must be multiples of {of}, got {size}"
