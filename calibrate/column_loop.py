"""GPTQ's inner loop: quantize the columns of one block one after the other.

Everything is laid out transposed, [columns, N], so that a column of W is contiguous. The loop does
a handful of in-place operations a column and never reads a value back, so on CUDA it is captured
once per shape as a CUDA graph and replayed: the same kernels in the same order as the eager loop,
without their launch cost (GPTQ on DiT-XL/2 quantizes 258,048 columns).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .integer_scales import choose_channel_scale, choose_multipliers
from .integers import IntegerRange
from .quantizers import best_clipping, range_parameters
from .schemes import LayerScheme


@dataclass(frozen=True)
class LoopShape:
    """What a captured loop depends on: `width` columns of N = `rows` weights, groups of `group`.

    `group` is the number of columns that share a scale, found at the first of them; None when the
    caller gives each column its scale.
    """

    width: int
    rows: int
    group: int | None
    scheme: LayerScheme
    clipped: bool


def channel_scales(
    columns: Tensor, scheme: LayerScheme, clipped: bool, importance: Tensor
) -> Tensor | None:
    """Each channel's scale [1, N] for its groups `columns` [G, g, N] of a weight as it was, each
    input weighted by its `importance` [G, g]; None where the scheme's scales are floats."""
    if not scheme.has_integer_scales:
        return None
    groups = columns.permute(2, 0, 1)
    return choose_channel_scale(groups, scheme, clipped=clipped, importance=importance).t()


def group_parameters(
    columns: Tensor,
    scheme: LayerScheme,
    clipped: bool,
    channel: Tensor | None = None,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point [G, N] of groups `columns` [G, g, N], as floats of stored precision.

    `clipped` shrinks each range to the ratio of least squared error (`best_clipping`). With
    integer scales each is a multiple of its channel's, `channel` [1, N], whose squared error,
    weighted by `importance` [G, g], is least (`choose_multipliers`).
    """
    if channel is not None:
        multiplier = choose_multipliers(
            columns.permute(2, 0, 1), channel.t(), scheme, clipped=clipped, importance=importance
        ).t()
        return channel * multiplier, torch.zeros_like(multiplier)
    if clipped:
        low, high = best_clipping(columns.transpose(-1, -2), scheme)
        low, high = low.squeeze(-1), high.squeeze(-1)
    else:
        low, high = columns.amin(dim=-2), columns.amax(dim=-2)
    return range_parameters(
        low, high, scheme.weight_bits, scheme.weight_symmetric, scheme.scale_dtype
    )


class ColumnLoop:
    """Buffers of one block and the loop over them: fill the inputs, `run()`, read the outputs.

    Inputs: columns [width, N] (changed by the run), factor [width, width], and, when the shape has
    no group, scale and zero_point [width, N]. With a group and integer scales: channel [1, N], each
    channel's scale, and importance [width] of the columns. Outputs: values [width, N] (integers q),
    errors [width, N] (w − ŵ of each column at its turn), and with a group its scale and zero_point
    [width / group, N].
    """

    def __init__(self, shape: LoopShape, like: Tensor) -> None:
        self.shape = shape
        groups = shape.width // (shape.group or 1)
        self.columns, self.values, self.errors = (
            like.new_ones(shape.width, shape.rows) for _ in range(3)
        )
        self.scale, self.zero_point = (like.new_ones(groups, shape.rows) for _ in range(2))
        self.channel, self.importance = like.new_ones(1, shape.rows), like.new_ones(shape.width)
        self.factor = torch.eye(shape.width, dtype=like.dtype, device=like.device)
        # eager and replayed runs are the same kernels in the same order, so the same bits
        self.run: Callable[[], None] = self._capture() if like.is_cuda else self.run_eagerly

    def run_eagerly(self) -> None:
        """The loop without a graph."""
        shape, scheme = self.shape, self.shape.scheme
        integers = IntegerRange.of(scheme.weight_bits, scheme.weight_symmetric)
        size = shape.group or 1
        for i in range(shape.width):
            group = i // size
            if shape.group is not None and i % size == 0:
                self._find_parameters(slice(i, i + size), slice(group, group + 1))
            self._quantize_column(i, self.scale[group], self.zero_point[group], integers)

    def _find_parameters(self, span: slice, group: slice) -> None:
        """The scale and zero point of one group from its columns as they are now."""
        scheme = self.shape.scheme
        scale, zero_point = group_parameters(
            self.columns[span].unsqueeze(0),
            scheme,
            self.shape.clipped,
            self.channel if scheme.has_integer_scales else None,
            self.importance[span].unsqueeze(0),
        )
        self.scale[group].copy_(scale)
        self.zero_point[group].copy_(zero_point)

    def _quantize_column(
        self, i: int, scale: Tensor, zero_point: Tensor, integers: IntegerRange
    ) -> None:
        """The steps of `quantizers.quantize`, in place, then the update of the columns after i."""
        column, value, error = self.columns[i], self.values[i], self.errors[i]
        torch.div(column, scale, out=value)
        value.round_()
        if self.shape.scheme.weight_symmetric:
            value.clamp_(integers.low, integers.high)
            torch.addcmul(column, value, scale, value=-1, out=error)
        else:
            value.add_(zero_point).clamp_(integers.low, integers.high)
            torch.sub(value, zero_point, out=error)
            torch.addcmul(column, error, scale, value=-1, out=error)
        if i + 1 < self.shape.width:
            self.columns[i + 1 :].addr_(self.factor[i, i + 1 :], error, alpha=-1)

    def _capture(self) -> Callable[[], None]:
        with torch.cuda.device(self.columns.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # a first run outside: capture may not load kernels
                self.run_eagerly()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.run_eagerly()
        return graph.replay


class ColumnLoops:
    """Column loops by shape, built on first use; kept for a whole model, captures are reused."""

    def __init__(self) -> None:
        self._loops: dict[tuple[LoopShape, torch.dtype, torch.device], ColumnLoop] = {}

    def of(self, shape: LoopShape, like: Tensor) -> ColumnLoop:
        """The loop of this shape in the dtype and on the device of `like`."""
        key = (shape, like.dtype, like.device)
        if key not in self._loops:
            self._loops[key] = ColumnLoop(shape, like)
        return self._loops[key]
