"""The plugins: what each reads and makes, and the launch of its kernel.

Inputs are named as the kernels' parameters are (`engines/kernels/cuda/`), and stand in their order;
outputs follow the kernels' integers. A tensor that a variant does not read is there all the same,
filled with another (`export/tensorrt/plugin_nodes.py`); one that it does not write has one element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from ....export.tensorrt.plugin_functions import (
    PRODUCT_INPUTS,
    ROWS_INPUTS,
    WEIGHT_ONLY_INPUTS,
)
from ....export.tensorrt.plugin_nodes import (
    ALL_VARIANTS,
    ProductVariant,
    RowsVariant,
    Variant,
    WeightOnlyVariant,
)
from ...kernels.driver import Gpu
from ...kernels.layouts import PANEL, ROW_STEP, padded
from ...kernels.variants import (
    WARPS_A_BLOCK,
    LinearKind,
    QuantizeKind,
    WeightOnlyKind,
    linear_defines,
    linear_shared_bytes,
)
from .launch import Launch, Tensors, expected_rows, rounded_up, rows_of
from .packing import kind_from_text
from .tactics import tactic_of, tile_of, tiles_for

_HALF_DTYPE = "float16"  # what plugin files compute in
_EPSILON_BITS = 0  # of 0.0f: the kernel's float parameter, which takes 32 bits as an integer does


class Plugin(Protocol):
    """What `register.py` needs of a plugin. `trtp` is the module `tensorrt.plugin`.

    types: data types of inputs and outputs, in the words of `AutoTuneCombination`;
    outputs: how many there are.
    """

    @property
    def name(self) -> str: ...

    @property
    def inputs(self) -> tuple[str, ...]: ...

    @property
    def types(self) -> str: ...

    @property
    def outputs(self) -> int: ...

    def describe(self, trt: Any, trtp: Any, given: Tensors, kind: str) -> tuple[Any, ...]:
        """The outputs' shapes and types."""

    def tactics(self, given: Tensors, kind: str, gpu: Gpu) -> list[int]:
        """What TensorRT may choose from, positive integers."""

    def launch(self, trtp: Any, given: Tensors, kind: str, tactic: int, gpu: Gpu) -> Launch:
        """The kernel's launch for the rows that `given` has."""


@dataclass(frozen=True)
class RowsPlugin:
    """`quantize.cu`: x [..., K] → values [P, M', 128], scale [G, M'], zero points, sums."""

    variant: RowsVariant
    inputs: tuple[str, ...] = ROWS_INPUTS
    types: str = "FP16,FP16,FP16,INT8,FP32,FP32,FP32"
    outputs: int = 4

    @property
    def name(self) -> str:
        return self.variant.name

    def describe(self, trt: Any, trtp: Any, given: Tensors, kind: str) -> tuple[Any, ...]:
        made: QuantizeKind = kind_from_text(QuantizeKind, kind)
        rows = rounded_up(trtp, rows_of(trtp, given["x"]), ROW_STEP)
        width = made.panels * PANEL
        groups = -(-width // made.group)
        sums = -(-width // made.sum_group) if made.sum_group else 0
        shapes: tuple[tuple[Any, ...], ...] = (
            (groups, rows),
            (groups, rows) if made.asymmetric else (1,),
            (sums, rows) if sums else (1,),
        )
        values = trtp.from_shape_expr((made.panels, rows, PANEL), trt.int8)
        return (values, *(trtp.from_shape_expr(shape, trt.float32) for shape in shapes))

    def tactics(self, given: Tensors, kind: str, gpu: Gpu) -> list[int]:
        return [1]

    def launch(self, trtp: Any, given: Tensors, kind: str, tactic: int, gpu: Gpu) -> Launch:
        made: QuantizeKind = kind_from_text(QuantizeKind, kind)
        count = rows_of(trtp, given["x"])
        span, team = made.span_and_team
        return Launch(
            file="quantize.cu",
            entry="qdit_quantize",
            defines=made.defines(_HALF_DTYPE),
            shared_bytes=made.shared_bytes,
            threads=32 * WARPS_A_BLOCK,
            grid=(trtp.cdiv(count, WARPS_A_BLOCK // team), made.panels // (span * team)),
            scalars=(
                count,
                rounded_up(trtp, count, ROW_STEP),
                made.width // 4,
                0,  # modulation stride
                1,  # tokens of an image
                _EPSILON_BITS,
            ),
        )


@dataclass(frozen=True)
class ProductPlugin:
    """`linear_sm90.cu` or `linear_sm80.cu`: quantized rows · packed weightᵀ + bias."""

    variant: ProductVariant
    inputs: tuple[str, ...] = PRODUCT_INPUTS
    types: str = "INT8,FP32,FP32,FP32,INT8,FP32,FP32,FP32,INT8,FP16,FP16,FP16,FP16"
    outputs: int = 1

    @property
    def name(self) -> str:
        return self.variant.name

    def describe(self, trt: Any, trtp: Any, given: Tensors, kind: str) -> tuple[Any, ...]:
        return (_like_with_channels(trt, trtp, given["residual"], given["bias"]),)

    def tactics(self, given: Tensors, kind: str, gpu: Gpu) -> list[int]:
        made: LinearKind = kind_from_text(LinearKind, kind)
        rows, channels = expected_rows(given["residual"]), int(given["bias"].shape[0])
        return [tactic_of(tile) for tile in tiles_for(made, rows, channels, gpu)]

    def launch(self, trtp: Any, given: Tensors, kind: str, tactic: int, gpu: Gpu) -> Launch:
        made: LinearKind = kind_from_text(LinearKind, kind)
        tile = tile_of(tactic)
        count, channels = rows_of(trtp, given["residual"]), given["bias"].shape_expr[0]
        tiles = trtp.cdiv(count, tile.tokens) * trtp.cdiv(channels, tile.channels)
        # on Hopper as many blocks as stay resident, and one warpgroup more that copies
        blocks = trtp.min(tiles, gpu.multiprocessors) if gpu.hopper else tiles
        return Launch(
            file="linear_sm90.cu" if gpu.hopper else "linear_sm80.cu",
            entry="qdit_linear",
            defines=linear_defines(made, tile, hopper=gpu.hopper, gated=False, bfloat16=False),
            shared_bytes=linear_shared_bytes(made, tile, gpu.hopper),
            threads=128 * (tile.warpgroups + int(gpu.hopper)),
            grid=(blocks, 1),
            scalars=(
                count,
                channels,
                made.panels,
                given["token_scale"].shape_expr[1],
                given["channel_scale"].shape_expr[1],
                made.segments_of(made.activation_group),
                made.segments_of(made.weight_group or made.multiplier_group),
                0,  # gate stride
                1,  # tokens of an image
            ),
        )


@dataclass(frozen=True)
class WeightOnlyPlugin:
    """`weight_only.cu`: float16 rows · packed weightᵀ + bias, for few rows."""

    variant: WeightOnlyVariant
    inputs: tuple[str, ...] = WEIGHT_ONLY_INPUTS
    types: str = "FP16,INT8,FP32,FP32,FP16,FP16"
    outputs: int = 1

    @property
    def name(self) -> str:
        return self.variant.name

    def describe(self, trt: Any, trtp: Any, given: Tensors, kind: str) -> tuple[Any, ...]:
        return (_like_with_channels(trt, trtp, given["x"], given["bias"]),)

    def tactics(self, given: Tensors, kind: str, gpu: Gpu) -> list[int]:
        """Rows of one block, the best batch's first: any of them computes any number of rows."""
        found = [min(_MOST_TOKENS, padded(count, 8)) for count in expected_rows(given["x"])]
        return list(dict.fromkeys(found))

    def launch(self, trtp: Any, given: Tensors, kind: str, tactic: int, gpu: Gpu) -> Launch:
        made: WeightOnlyKind = kind_from_text(WeightOnlyKind, kind)
        count, channels = rows_of(trtp, given["x"]), given["bias"].shape_expr[0]
        return Launch(
            file="weight_only.cu",
            entry="qdit_weight_only",
            defines=made.defines(tactic, bfloat16=False),
            shared_bytes=0,
            threads=128,
            grid=(trtp.cdiv(channels, _CHANNELS), trtp.cdiv(count, tactic)),
            scalars=(
                count,
                channels,
                made.width,
                given["channel_scale"].shape_expr[1],
                made.weight_group // made.segment,
                made.width,  # row stride
            ),
        )


_MOST_TOKENS, _CHANNELS = 32, 128  # of one block of `weight_only.cu`


def plugin_of(variant: Variant) -> Plugin:
    """The plugin of a variant."""
    if isinstance(variant, RowsVariant):
        return RowsPlugin(variant)
    if isinstance(variant, ProductVariant):
        return ProductPlugin(variant)
    return WeightOnlyPlugin(variant)


def all_plugins() -> list[Plugin]:
    """Every plugin that a file may name."""
    return [plugin_of(variant) for variant in ALL_VARIANTS]


def _like_with_channels(trt: Any, trtp: Any, rows: Any, bias: Any) -> Any:
    """The sizes of `rows`, its last one the bias's."""
    leading = [rows.shape_expr[index] for index in range(len(rows.shape_expr) - 1)]
    return trtp.from_shape_expr((*leading, bias.shape_expr[0]), trt.float16)
