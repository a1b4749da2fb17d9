"""What the `onnxruntime` target makes of each scheme, and the nearest scheme that it runs as it is.

It can write every plan: what its own operators do not compute stays in the form of the reference,
which is slow, and an activation group that is no block of MatMulNBits gets finer, which is said.
Facts marked [tested] are run by `tests/export/test_capabilities.py`.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from ...calibrate.plan import LinearSpec
from ...calibrate.schemes import GROUP_SIZES, LayerScheme
from ..realization import Realization

# MatMulNBits computes blocks of these sizes right; 512 gave zeros (onnxruntime #28551). [tested]
NBITS_BLOCKS = (16, 32, 64, 128, 256)
# A plan cannot name activation groups of 16, so that what the file computes stays a scheme.
_ACTIVATION_BLOCKS = tuple(size for size in NBITS_BLOCKS if size in GROUP_SIZES)


def realize_onnxruntime(spec: LinearSpec, scheme: LayerScheme) -> Realization:
    """The linear in ONNX Runtime's operators on a CPU.

    1. 'float': weights of 16 bits.
    2. 'int8': symmetric token activations of any bits with one weight scale a channel, or integer
       scales: one MatMulIntegerToFloat of unsigned activations and int8 weights. [tested]
    3. 'nbits': symmetric 8-bit activations in groups of a block that divides the weight group:
       MatMulNBits at accuracy level 4, weight scales repeated in coarser groups. [tested]
    4. 'nbits', finer: symmetric 8-bit activations in any other group: the largest block that
       divides both groups; weights exact, activation groups finer than planned.
    5. 'int8-split', 'nbits-split': weight-only adaLN. The input is the sum of three 8-bit parts,
       24 bits and more, so that the operators of cases 2 and 3 compute it as exactly as float32.
    6. 'nbits-float': other weight-only linears of 4 bits or fewer: MatMulNBits at level 1.
    7. 'dequantized': weight-only linears of 6 or 8 bits, which level 1 would unpack in every run,
       and those without a block: weights become floats at load.
    8. 'qdq', as in the reference: asymmetric activations; grouped ones of 4 or 6 bits, or in groups
       without a block.
    """
    if not scheme.quantizes_weights:
        return Realization("float", scheme)
    if not scheme.quantizes_activations:
        return _weight_only(spec, scheme)
    if not scheme.activation_symmetric:
        return Realization("qdq", scheme, "its integer products take symmetric activations only")
    k = spec.in_features
    wanted = scheme.activation_group_size(k)
    if wanted == k and is_int8_by_channel(spec, scheme):
        return Realization("int8", scheme)
    if scheme.activation_bits != 8:
        return Realization(
            "qdq",
            scheme,
            f"MatMulNBits quantizes activations to 8 bits, not {scheme.activation_bits}",
        )
    block = _largest_block(gcd(scheme.weight_group_size(k), wanted), _ACTIVATION_BLOCKS)
    if block is None:
        blocks = ", ".join(map(str, _ACTIVATION_BLOCKS))
        return Realization(
            "qdq", scheme, f"no block of {blocks} divides both groups of {scheme.label}"
        )
    if block == wanted:
        return Realization("nbits", scheme)
    return Realization(
        "nbits",
        replace(scheme, activation_group=block),
        f"MatMulNBits quantizes activations in blocks that divide the weight group: in groups of "
        f"{block}, finer than {scheme.activation_group}",
    )


def _weight_only(spec: LinearSpec, scheme: LayerScheme) -> Realization:
    is_adaln = spec.role == "adaln"
    if is_adaln and is_int8_by_channel(spec, scheme):
        return Realization("int8-split", scheme)
    if nbits_block(spec, scheme) is None:
        return Realization("dequantized", scheme)
    if is_adaln:
        return Realization("nbits-split", scheme)
    return Realization("dequantized" if scheme.weight_bits > 4 else "nbits-float", scheme)


def nbits_block(spec: LinearSpec, scheme: LayerScheme) -> int | None:
    """MatMulNBits' block for the scheme: the activation group where there is one, else the largest
    that divides the weight group; None where there is none."""
    k = spec.in_features
    size = scheme.weight_group_size(k)
    if scheme.quantizes_activations:
        size = gcd(size, scheme.activation_group_size(k))
    return _largest_block(size, NBITS_BLOCKS)


def is_int8_by_channel(spec: LinearSpec, scheme: LayerScheme) -> bool:
    """Whether the weights are integers of 8 bits at most with one scale a channel."""
    return scheme.has_integer_scales or scheme.weight_group_size(spec.in_features) == (
        spec.in_features
    )


def refuse_onnxruntime(spec: LinearSpec, scheme: LayerScheme) -> str | None:
    """Why the target's own operators do not run the scheme as it is, or None."""
    made = realize_onnxruntime(spec, scheme)
    return None if made.is_native() and made.is_exact(scheme) else made.reason


def nearest_onnxruntime(spec: LinearSpec, scheme: LayerScheme) -> LayerScheme:
    """The scheme that changes least and runs in the target's own operators (`target_rules.py`)."""
    symmetric = replace(scheme, activation_symmetric=True)
    if refuse_onnxruntime(spec, symmetric) is None:
        return symmetric
    k = spec.in_features
    shared = gcd(scheme.weight_group_size(k), scheme.activation_group_size(k))
    block = _largest_block(shared, _ACTIVATION_BLOCKS)
    if block is not None:
        return replace(symmetric, activation_bits=8, activation_group=block)
    return scheme.weight_only()


def _largest_block(size: int, blocks: tuple[int, ...]) -> int | None:
    return max((block for block in blocks if size % block == 0), default=None)
