"""Which kernel computes a scheme, and with which tile: frozen values that become definitions.

A linear's *meaning* follows from its scheme (`LinearKind`), its *tile* (`Tile`) is a matter of
speed alone and is what autotuning chooses.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from ...calibrate.quantizers import IntegerRange
from ...calibrate.schemes import LayerScheme
from ...errors import InputError
from .layouts import PANEL

Gelu = Literal["tanh", "exact"]
STEP = 32  # k of one matrix instruction: scales may change after each


@dataclass(frozen=True)
class LinearKind:
    """What a product computes. Groups count k; None is one scale a token or channel.

    multipliers: weights are 4-bit integers times an integer a group of `multiplier_group`, with one
    float scale a channel. Zero points put both sides' scales into the loop over k. short_scales:
    weight scales have at most 11 significant bits (float16 ones do), which saves an instruction.
    """

    width: int
    weight_bits: int  # of the container: 4 or 8
    weight_group: int | None
    activation_group: int | None
    multiplier_group: int | None = None
    weight_zero: bool = False
    input_zero: bool = False
    short_scales: bool = False

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
        multipliers = scheme.has_integer_scales
        return cls(
            width=k,
            weight_bits=4 if scheme.weight_bits <= 4 else 8,
            weight_group=None if multipliers or (weight == k and not zeros) else weight,
            activation_group=None if activation == k and not zeros else activation,
            multiplier_group=weight if multipliers else None,
            weight_zero=not scheme.weight_symmetric,
            input_zero=not scheme.activation_symmetric,
            short_scales=scheme.scale_dtype == "float16",
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
            "QDIT_SHORT_SCALES": int(self.short_scales),
            "QDIT_SEGMENT_PANELS": max(1, self.segment // PANEL),
        }


@dataclass(frozen=True)
class Tile:
    """How a product is cut: tokens × `channels` a block, `stages` panels ahead.

    turns: whether warpgroups use the matrix unit one after the other, 0, 1 or 2 (Hopper).
    pipelined: two panels in flight a warpgroup (Hopper).
    splits: warpgroups that share 64 channels, each with every `splits`th panel, and add up
    (Hopper). Float sums are rounded in another order then; those of integers alone are the same.
    starts: the matrix unit starts sums from a constant, so that they can be read as floats at once
    (Hopper).
    """

    tokens: int
    warpgroups: int = 2
    stages: int = 4
    turns: int = 0
    pipelined: bool = False
    starts: bool = False
    splits: int = 1

    def __post_init__(self) -> None:
        if self.splits < 1 or self.warpgroups % self.splits:
            raise InputError(
                f"a tile's splits must divide its {self.warpgroups} warpgroups, got {self.splits}"
            )
        if self.tokens % 16 or not 16 <= self.tokens <= 256:
            raise InputError(
                f"a tile's tokens must be a multiple of 16 up to 256, got {self.tokens}"
            )

    @property
    def channels(self) -> int:
        return 64 * self.columns

    @property
    def columns(self) -> int:
        """Of 64 channels."""
        return self.warpgroups // self.splits

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def linear_defines(
    kind: LinearKind, tile: Tile, *, hopper: bool, gated: bool, bfloat16: bool
) -> dict[str, int]:
    """Definitions of one variant of `linear_sm90.cu`, or of `linear_sm80.cu` if not `hopper`.

    gated: y = residual + gate · product instead of the product itself.
    """
    return kind.defines() | {
        "QDIT_TILE_TOKENS": tile.tokens,
        "QDIT_WARPGROUPS": tile.warpgroups,
        "QDIT_STAGES": tile.stages,
        "QDIT_TURNS": tile.turns,
        "QDIT_PIPELINED": int(tile.pipelined),
        "QDIT_STARTS": int(tile.starts),
        "QDIT_SPLITS": tile.splits,
        "QDIT_GATED": int(gated),
        "QDIT_SHARED_BYTES": linear_shared_bytes(kind, tile, hopper),
        "QDIT_BF16": int(bfloat16),
    }


def linear_shared_bytes(kind: LinearKind, tile: Tile, hopper: bool) -> int:
    """Dynamic shared memory of one block, as the kernel lays it out."""
    segments = max(1, PANEL // kind.segment)
    operands = tile.channels * (kind.weight_bits * 16) + tile.tokens * PANEL
    zeros = int(kind.weight_zero) + int(kind.input_zero)
    token_arrays = int(kind.activation_group is not None) + zeros
    channel_arrays = int(kind.weight_group is not None) + zeros
    scales = segments * 4 * (token_arrays * tile.tokens + channel_arrays * tile.channels)
    scales += segments * tile.channels * int(kind.multiplier_group is not None)
    staging = tile.columns * tile.tokens * 144
    parts = (tile.warpgroups - tile.columns) * tile.tokens * 256  # sums on their way
    if hopper:
        start = 256 * int(tile.starts)  # kStartBytes of the kernel
        copied = tile.stages * operands + _padded(tile.stages * scales)
        return copied + staging + parts + start + 16 * tile.stages
    return max(tile.stages * (operands + _padded(scales)), staging)


def _padded(count: int) -> int:
    return -(-count // 128) * 128


class Limits(Protocol):
    """What a tile must fit: `driver.Gpu`."""

    @property
    def hopper(self) -> bool: ...

    @property
    def shared_bytes(self) -> int: ...


def tile_problem(kind: LinearKind, tile: Tile, limits: Limits) -> str | None:
    """Why a tile cannot be used, or None."""
    hopper = limits.hopper
    if (tile.turns or tile.pipelined) and not (hopper and _promotes(kind)):
        return "turns and pipelining are for Hopper, and for products that promote along k"
    if tile.starts and not (hopper and _promotes(kind) and kind.segment <= PANEL):
        return "sums start from a constant on Hopper, where scales change at least every 128 k"
    if tile.splits > 1 and not (hopper and (not _promotes(kind) or kind.segment == PANEL)):
        return f"panels are shared on Hopper, where scales change every {PANEL} k or not at all"
    if tile.splits > 1 and (tile.turns or tile.pipelined or tile.stages < 2 * tile.splits):
        return "panels are shared without turns or pipelining, and with two stages for each part"
    if tile.splits > kind.panels:
        return f"{kind.panels} panels of {PANEL} k are too few for {tile.splits} parts"
    if tile.pipelined and tile.turns == 2:
        return "a pipelined warpgroup cannot wait for its turn's end"
    if tile.pipelined and kind.segment != PANEL:
        return f"pipelining needs scales that change every {PANEL} k, not every {kind.segment}"
    # one matrix instruction must fit into what a thread has before registers are shared out anew
    if hopper and tile.tokens // 2 + 30 > 65536 // (128 * (tile.warpgroups + 1)) // 8 * 8:
        return f"{tile.tokens} tokens an instruction need more registers than a block starts with"
    sums = tile.tokens // 2 * (1 + _promotes(kind) + tile.pipelined)
    scales = 8 if kind.activation_group is not None else 0  # more where there is room
    operands = (42 if tile.pipelined else 8) if kind.weight_bits == 4 else 0
    registers = sums + scales + operands + 24  # what compiles without spills
    limit = {1: 240, 2: 232, 3: 160}[tile.warpgroups] if hopper else 255
    if registers > limit:
        return f"about {registers} registers a thread, {limit} are there"
    needed = linear_shared_bytes(kind, tile, hopper)
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
    none; normalized: layer normalization and adaLN's modulation first; gelu: GELU first, in its
    tanh form or the exact one.
    """

    width: int
    group: int
    bits: int = 8
    asymmetric: bool = False
    sum_group: int = 0
    normalized: bool = False
    gelu: Gelu | None = None

    @classmethod
    def of(
        cls,
        scheme: LayerScheme,
        in_features: int,
        *,
        normalized: bool = False,
        gelu: Gelu | None = None,
    ) -> QuantizeKind:
        """The input side of `scheme`, with what is fused in front."""
        kind = LinearKind.of(scheme, in_features)
        return cls(
            width=in_features,
            group=scheme.activation_group_size(in_features),
            bits=scheme.activation_bits,
            asymmetric=not scheme.activation_symmetric,
            sum_group=kind.segment if kind.weight_zero else 0,
            normalized=normalized,
            gelu=gelu,
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
        return 0 if self.in_registers else WARPS_A_BLOCK * self.panels * PANEL * 5

    @property
    def span_and_team(self) -> tuple[int, int]:
        """(panels of a row that one warp takes, warps that share one row's scale)."""
        if not self.in_registers or self.normalized:
            return self.panels, 1
        if self.group == self.width:
            teams = (t for t in (1, 2, 4, 8) if self.panels % t == 0)
            team = next((t for t in teams if self.panels // t <= _MOST_PANELS), 1)
            return self.panels // team, team
        # few panels a warp: more loads in flight, and more warps for a small batch
        most = 4 if self.group <= PANEL else _MOST_PANELS
        step = max(1, self.group // PANEL)
        spans = range(step, max(most, step) + 1, step)
        return max(span for span in spans if self.panels % span == 0), 1

    def grid(self, count: int) -> tuple[int, int]:
        """Blocks for `count` rows."""
        span, team = self.span_and_team
        return -(-count // (WARPS_A_BLOCK // team)), self.panels // (span * team)

    def defines(self, dtype: str) -> dict[str, int]:
        """Definitions of `quantize.cu` for input of 'float16', 'bfloat16' or 'float32'."""
        span, team = self.span_and_team
        return {
            "QDIT_SPAN": span,
            "QDIT_TEAM": team,
            "QDIT_WIDTH": self.width,
            "QDIT_GROUP": self.group,
            "QDIT_STEPS": IntegerRange.of(self.bits, not self.asymmetric).steps,
            "QDIT_ASYMMETRIC": int(self.asymmetric),
            "QDIT_SUM_GROUP": self.sum_group,
            "QDIT_NORM": int(self.normalized),
            "QDIT_GELU": {None: 0, "tanh": 1, "exact": 2}[self.gelu],
            "QDIT_INPUT_FLOAT32": int(dtype == "float32"),
            "QDIT_BF16": int(dtype == "bfloat16"),
        }


WARPS_A_BLOCK = 8
_MOST_PANELS = 12  # of one warp: 48 values a thread


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
                f"the weight-only kernel takes quantized weights with groups of multiples of "
                f"{STEP}, got {group} ({scheme.label})"
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
