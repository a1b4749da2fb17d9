"""Which kernel computes a scheme, and with which tile: frozen values that become definitions.

A linear's *meaning* follows from its scheme (`LinearKind`), its *tile* (`Tile`) is a matter of
speed alone and is what autotuning chooses.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from ...calibrate.quantizers import IntegerRange
from ...calibrate.schemes import LayerScheme
from ...errors import InputError
from .layouts import PANEL

STEP = 32  # k of one matrix instruction: scales may change after each


@dataclass(frozen=True)
class LinearKind:
    """What a product computes. Groups count k; None is one scale a token or channel.

    multipliers: weights are 4-bit integers times an integer a group of `multiplier_group`, with one
    float scale a channel. Zero points put both sides' scales into the loop over k.
    """

    width: int
    weight_bits: int  # of the container: 4 or 8
    weight_group: int | None
    activation_group: int | None
    multiplier_group: int | None = None
    weight_zero: bool = False
    input_zero: bool = False

    @classmethod
    def of(cls, scheme: LayerScheme, in_features: int) -> LinearKind:
        """The kind that computes `scheme` for K = `in_features`. Raises `InputError` where no
        kernel does: unquantized sides, and groups that 32 does not divide."""
        if not (scheme.quantizes_weights and scheme.quantizes_activations):
            raise InputError(
                f"integer products need both sides quantized, got {scheme.label}; "
                "weight-only linears have a kernel of their own"
            )
        k = in_features
        weight, activation = scheme.weight_group_size(k), scheme.activation_group_size(k)
        for side, group in (("weight", weight), ("activation", activation)):
            if group % STEP or k % group:
                raise InputError(
                    f"a {side} group of the kernels must divide the layer's {k} input channels and "
                    f"be a multiple of {STEP}, got {group}"
                )
        zeros = not (scheme.weight_symmetric and scheme.activation_symmetric)
        multipliers = getattr(scheme, "scale_format", "float") == "integer"
        return cls(
            width=k,
            weight_bits=4 if scheme.weight_bits <= 4 else 8,
            weight_group=None if multipliers or (weight == k and not zeros) else weight,
            activation_group=None if activation == k and not zeros else activation,
            multiplier_group=weight if multipliers else None,
            weight_zero=not scheme.weight_symmetric,
            input_zero=not scheme.activation_symmetric,
        )

    @property
    def panels(self) -> int:
        return -(-self.width // PANEL)

    @property
    def segment(self) -> int:
        """k between two changes of a scale: a divisor of 128, or a multiple of it."""
        groups = (self.weight_group, self.activation_group, self.multiplier_group)
        within = [group for group in groups if group is not None]
        common = math.gcd(*within) if within else PANEL
        return common if common % PANEL == 0 else math.gcd(common, PANEL)

    @property
    def segments(self) -> int:
        """Segments of the padded width."""
        return -(-self.panels * PANEL // self.segment)

    def rows_of_scales(self, group: int | None) -> int:
        """Rows that a scale array needs: one a group of the padded width."""
        if group is None:
            return 1
        return -(-self.segments * self.segment // group)

    def segments_of(self, group: int | None) -> int:
        """Segments that share a group's scale."""
        return self.segments if group is None else group // self.segment

    def defines(self) -> dict[str, int]:
        return {
            "QDIT_WEIGHT_BITS": self.weight_bits,
            "QDIT_SEGMENT": min(self.segment, PANEL),
            "QDIT_TOKEN_SCALES": int(self.activation_group is not None),
            "QDIT_CHANNEL_SCALES": int(self.weight_group is not None),
            "QDIT_MULTIPLIERS": int(self.multiplier_group is not None),
            "QDIT_WEIGHT_ZERO": int(self.weight_zero),
            "QDIT_INPUT_ZERO": int(self.input_zero),
        }


@dataclass(frozen=True)
class Tile:
    """How a product is cut: tokens × 64 · warpgroups channels a block, `stages` panels ahead.

    cluster: blocks that share each activation tile (Hopper); pipelined: two panels in flight a
    warpgroup (Hopper).
    """

    tokens: int
    warpgroups: int = 2
    cluster: int = 1
    stages: int = 4
    pipelined: bool = False

    def __post_init__(self) -> None:
        if self.tokens % (8 * self.cluster) or not 8 <= self.tokens <= 256:
            raise InputError(
                f"a tile's tokens must be a multiple of {8 * self.cluster} up to 256, "
                f"got {self.tokens}"
            )

    @property
    def channels(self) -> int:
        return 64 * self.warpgroups

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Epilogue:
    """What becomes of a product: written in 16 bits, gated into a residual, or quantized.

    gated: y = residual + gate · product. out_group: GELU, then int8 with a scale a token and group
    of so many channels, the next product's input.
    """

    gated: bool = False
    out_group: int = 0


def linear_defines(
    kind: LinearKind, tile: Tile, epilogue: Epilogue, bfloat16: bool
) -> dict[str, int]:
    """Preprocessor definitions of one variant of `linear_sm*.cu`."""
    return kind.defines() | {
        "QDIT_TILE_TOKENS": tile.tokens,
        "QDIT_WARPGROUPS": tile.warpgroups,
        "QDIT_CLUSTER": tile.cluster,
        "QDIT_STAGES": tile.stages,
        "QDIT_PIPELINED": int(tile.pipelined),
        "QDIT_GATED": int(epilogue.gated),
        "QDIT_OUT_GROUP": epilogue.out_group,
        "QDIT_BF16": int(bfloat16),
    }


def linear_shared_bytes(kind: LinearKind, tile: Tile, epilogue: Epilogue, hopper: bool) -> int:
    """Dynamic shared memory of one block, as the kernel lays it out."""
    parts = max(1, PANEL // kind.segment)
    operands = tile.channels * (kind.weight_bits * 16) + tile.tokens * PANEL
    zeros = int(kind.weight_zero) + int(kind.input_zero)
    token_arrays = int(kind.activation_group is not None) + zeros
    channel_arrays = int(kind.weight_group is not None) + zeros
    scales = parts * 4 * (token_arrays * tile.tokens + channel_arrays * tile.channels)
    scales += parts * tile.channels * int(kind.multiplier_group is not None)
    staging = tile.warpgroups * tile.tokens * 144
    extras = 0
    if epilogue.out_group:
        parts_here = max(1, 64 // epilogue.out_group)
        extras = tile.warpgroups * tile.tokens * (16 + 8 * parts_here)
    if hopper:
        barriers = 2 * tile.stages * 8 + 64
        return (
            tile.stages * operands + padded_128(tile.stages * scales) + staging + barriers + extras
        )
    return max(tile.stages * (operands + padded_128(scales)), staging + extras)


def padded_128(count: int) -> int:
    return -(-count // 128) * 128


class Limits(Protocol):
    """What a tile must fit: `driver.Gpu`."""

    @property
    def hopper(self) -> bool: ...

    @property
    def shared_bytes(self) -> int: ...


def tile_problem(kind: LinearKind, tile: Tile, epilogue: Epilogue, limits: Limits) -> str | None:
    """Why a tile cannot be used, or None."""
    hopper = limits.hopper
    if not hopper and (tile.cluster > 1 or tile.pipelined):
        return "clusters and pipelining need sm_90a"
    if tile.pipelined and kind.segment != PANEL and _promotes(kind):
        return f"pipelining needs scales that change every {PANEL} k, not every {kind.segment}"
    if epilogue.out_group and tile.channels % epilogue.out_group:
        return f"{tile.channels} channels are no multiple of the output group {epilogue.out_group}"
    # one matrix instruction must fit into what a thread has before registers are shared out anew
    if hopper and tile.tokens // 2 + 30 > 65536 // (128 * (tile.warpgroups + 1)) // 8 * 8:
        return f"{tile.tokens} tokens an instruction need more registers than a block starts with"
    integers = tile.tokens // 2 * (2 if tile.pipelined and _promotes(kind) else 1)
    operands = (32 if tile.pipelined else 16) if kind.weight_bits == 4 else 0
    registers = integers + (tile.tokens // 2 if _promotes(kind) else 0) + operands + 26
    limit = {1: 240, 2: 232, 3: 160}[tile.warpgroups] if hopper else 255
    if registers > limit:
        return f"about {registers} registers a thread, {limit} are there"
    needed = linear_shared_bytes(kind, tile, epilogue, hopper)
    if needed > limits.shared_bytes:
        return f"{needed} bytes of shared memory, {limits.shared_bytes} are there"
    return None


def _promotes(kind: LinearKind) -> bool:
    scales = (kind.weight_group, kind.activation_group)
    return any(group is not None for group in scales) or kind.weight_zero or kind.input_zero


@dataclass(frozen=True)
class QuantizeKind:
    """What a quantization of rows [M, K] computes.

    group: k that share a scale (K for one a token); sum_group: k of each sum of integers, 0 for
    none; normalized: layer normalization and adaLN's modulation first; gelu: GELU first.
    """

    width: int
    group: int
    bits: int = 8
    asymmetric: bool = False
    sum_group: int = 0
    normalized: bool = False
    gelu: bool = False

    @classmethod
    def of(cls, scheme: LayerScheme, in_features: int, **producer: bool) -> QuantizeKind:
        """The input side of `scheme`; `producer` says what is fused in front."""
        kind = LinearKind.of(scheme, in_features)
        return cls(
            width=in_features,
            group=scheme.activation_group_size(in_features),
            bits=scheme.activation_bits,
            asymmetric=not scheme.activation_symmetric,
            sum_group=kind.segment if kind.weight_zero else 0,
            **producer,
        )

    @property
    def panels(self) -> int:
        return -(-self.width // PANEL)

    @property
    def in_registers(self) -> bool:
        """Whether the kernel needs no shared memory (`kInRegisters` there)."""
        plain = self.width % PANEL == 0 and not self.asymmetric and self.sum_group == 0
        return plain and (self.group in (32, 64) or self.group % PANEL == 0)

    @property
    def shared_bytes(self) -> int:
        return 0 if self.in_registers else ROWS_A_BLOCK * self.panels * PANEL * 5

    def defines(self, dtype: str) -> dict[str, int]:
        """Definitions of `quantize.cu` for input of 'float16', 'bfloat16' or 'float32'."""
        return {
            "QDIT_WIDTH": self.width,
            "QDIT_GROUP": self.group,
            "QDIT_STEPS": IntegerRange.of(self.bits, not self.asymmetric).steps,
            "QDIT_ASYMMETRIC": int(self.asymmetric),
            "QDIT_SUM_GROUP": self.sum_group,
            "QDIT_NORM": int(self.normalized),
            "QDIT_GELU": int(self.gelu),
            "QDIT_INPUT_FLOAT32": int(dtype == "float32"),
            "QDIT_BF16": int(dtype == "bfloat16"),
        }


ROWS_A_BLOCK = 8


@dataclass(frozen=True)
class WeightOnlyKind:
    """A product of 16-bit rows [M, K] with 4- or 8-bit weights, M small."""

    width: int
    weight_bits: int
    weight_group: int
    weight_zero: bool = False

    @classmethod
    def of(cls, scheme: LayerScheme, in_features: int) -> WeightOnlyKind:
        group = scheme.weight_group_size(in_features)
        if not scheme.quantizes_weights or group % STEP:
            raise InputError(
                f"the weight-only kernel takes weight groups of multiples of {STEP}, "
                f"got {scheme.label}"
            )
        bits = 4 if scheme.weight_bits <= 4 else 8
        return cls(in_features, bits, group, not scheme.weight_symmetric)

    @property
    def segment(self) -> int:
        return math.gcd(self.weight_group, PANEL)

    def defines(self, tokens: int, bfloat16: bool) -> dict[str, int]:
        return {
            "QDIT_TILE_TOKENS": tokens,
            "QDIT_WEIGHT_BITS": self.weight_bits,
            "QDIT_WEIGHT_ZERO": int(self.weight_zero),
            "QDIT_SEGMENT": self.segment,
            "QDIT_BF16": int(bfloat16),
        }
