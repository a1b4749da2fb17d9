"""Launch the plugins' kernels as TensorRT does, through the CUDA driver alone.

PTX as it is given to TensorRT, the launch that the plugin layer evaluates, arguments in its order:
inputs, integers, outputs. Beside it the same product by PyTorch's way, whose outputs must be equal
to the bit. Needs a GPU and no TensorRT (`benchmarks/tensorrt_plugin.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....calibrate.quantizers import quantize_weight_nearest
from ....calibrate.schemes import LayerScheme
from ....export.tensorrt.plugin_nodes import ProductVariant, RowsVariant, WeightOnlyVariant
from ...kernels.compile import compile_kernel
from ...kernels.driver import Gpu, Kernel
from ...kernels.operands import QuantizedRows
from ...kernels.product import linear
from ...kernels.rows import quantize_rows
from ...kernels.variants import LinearKind, QuantizeKind, WeightOnlyKind
from ...kernels.weight_only import weight_only_linear
from ...kernels.weights import PackedWeight, pack_weight
from .launch import Launch
from .numeric import numeric_launch, numeric_tactics
from .packing import kind_text
from .plugins import Plugin, plugin_of
from .ptx import capped
from .register import driver_isa
from .tactics import tile_of


@dataclass(frozen=True)
class LoadedPlugin:
    """A compiled tactic with its operands. outputs: all that TensorRT would pass; `places`: which
    of them this variant writes."""

    launch_parameters: Launch
    kernel: Kernel
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    places: tuple[int, ...]

    def launch(self) -> None:
        """Enqueue it on torch's current stream."""
        parameters = self.launch_parameters
        arguments = (*self.inputs, *parameters.scalars, *self.outputs)
        self.kernel.launch(parameters.grid, parameters.threads, arguments)

    def written(self) -> list[Tensor]:
        """The outputs that this variant writes."""
        return [self.outputs[index] for index in self.places]


@dataclass(frozen=True)
class PluginCase:
    """One plugin on one shape. inputs: by the kernel's parameter names, in their order; outputs:
    what it writes, and one element for what it does not; pytorch: the same by PyTorch's way."""

    plugin: Plugin
    kind: str
    inputs: dict[str, Tensor]
    outputs: tuple[Tensor, ...]
    pytorch: Callable[[int], list[Tensor]]
    device: Gpu
    rows: int
    width: int
    channels: int

    def tactics(self) -> list[int]:
        """What TensorRT would be offered for these shapes."""
        return numeric_tactics(self.plugin, self._shapes, self.kind, self.device)

    def load(self, tactic: int) -> LoadedPlugin:
        """Compile a tactic to PTX and load it; outputs are filled with what no kernel writes."""
        launch = numeric_launch(self.plugin, self._shapes, self.kind, tactic, self.device)
        code = compile_kernel(launch.file, launch.defines, self.device.architecture, "ptx")
        ptx = capped(code, driver_isa()) + b"\0"
        kernel = Kernel(ptx, launch.entry, launch.shared_bytes, dependent=False)
        outputs = tuple(_poisoned(output) for output in self.outputs)
        written = tuple(i for i, output in enumerate(outputs) if output.numel() > 1)
        return LoadedPlugin(launch, kernel, tuple(self.inputs.values()), outputs, written)

    @property
    def _shapes(self) -> dict[str, Sequence[int]]:
        return {name: tuple(tensor.shape) for name, tensor in self.inputs.items()}


def cases_of(
    scheme: LayerScheme,
    rows: int,
    width: int,
    channels: int,
    device: Gpu,
    *,
    place: torch.device | str = "cuda",
) -> list[PluginCase]:
    """The plugins of a linear K = `width` → N = `channels` of a scheme, on random numbers.

    rows: a multiple of 16, so that no output has padding, which is undefined; place: where the
    operands lie.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator).half().to(place)
    matrix = torch.randn(channels, width, generator=generator) * 0.05
    bias = torch.randn(channels, generator=generator).half().to(place)
    weight = quantize_weight_nearest(matrix, scheme)
    if not scheme.quantizes_activations:
        packed = pack_weight([weight], scheme).to(place)
        return [_weight_only(scheme, x, packed, bias, device)]
    kind = LinearKind.of(scheme, width)
    packed = pack_weight([weight], scheme, kind).to(place)
    made = quantize_rows(x, QuantizeKind.of(scheme, width))
    return [_rows(x, made, channels, device), _product(kind, x, made, packed, bias, device)]


def _rows(x: Tensor, made: QuantizedRows, channels: int, device: Gpu) -> PluginCase:
    kind, (rows, width) = made.kind, x.shape
    placeholder = torch.zeros(1, device=x.device)
    outputs = (
        made.values,
        made.scale,
        placeholder if made.zero is None else made.zero,
        placeholder if made.total is None else made.total,
    )

    def pytorch(tactic: int) -> list[Tensor]:
        again = quantize_rows(x, kind)
        parts = (again.values, again.scale, again.zero, again.total)
        return [part for part in parts if part is not None]

    plugin = plugin_of(RowsVariant(kind.asymmetric, kind.sum_group > 0))
    inputs = {"x": x, "shift": x, "scale": x}
    return PluginCase(
        plugin, kind_text(kind), inputs, outputs, pytorch, device, rows, width, channels
    )


def _product(
    kind: LinearKind,
    x: Tensor,
    made: QuantizedRows,
    packed: PackedWeight,
    bias: Tensor,
    device: Gpu,
) -> PluginCase:
    """Operands that a variant does not read are filled as in a file (`lower_plugin.py`)."""
    rows, width = x.shape
    unread = torch.zeros(1, device=x.device)
    inputs = {
        "x": made.values,
        "token_scale": made.scale,
        "token_sum": unread if made.total is None else made.total,
        "token_zero": unread if made.zero is None else made.zero,
        "w": packed.values,
        "channel_scale": packed.scale,
        "channel_zero": packed.scale if packed.zero is None else packed.zero,
        "channel_sum": packed.scale if packed.total is None else packed.total,
        "multiplier": packed.values if packed.multiplier is None else packed.multiplier,
        "bias": bias,
        "residual": x,
        "gate": x,
    }
    out = torch.empty(rows, packed.channels, dtype=torch.float16, device=x.device)

    def pytorch(tactic: int) -> list[Tensor]:
        return [linear(made, packed, kind, bias=bias, tile=tile_of(tactic))]

    multipliers = kind.multiplier_group is not None
    variant = ProductVariant(kind.weight_bits, multipliers, kind.weight_zero, kind.input_zero)
    return PluginCase(
        plugin_of(variant),
        kind_text(kind),
        inputs,
        (out,),
        pytorch,
        device,
        rows,
        width,
        packed.channels,
    )


def _weight_only(
    scheme: LayerScheme, x: Tensor, packed: PackedWeight, bias: Tensor, device: Gpu
) -> PluginCase:
    rows, width = x.shape
    kind = WeightOnlyKind.of(scheme, width)
    inputs = {
        "x": x,
        "w": packed.values,
        "channel_scale": packed.scale,
        "channel_zero": packed.scale if packed.zero is None else packed.zero,
        "bias": bias,
    }
    out = torch.empty(rows, packed.channels, dtype=torch.float16, device=x.device)

    def pytorch(tactic: int) -> list[Tensor]:
        return [weight_only_linear(x, packed, kind, bias)]

    plugin = plugin_of(WeightOnlyVariant(kind.weight_bits, kind.weight_zero))
    return PluginCase(
        plugin, kind_text(kind), inputs, (out,), pytorch, device, rows, width, packed.channels
    )


def _poisoned(output: Tensor) -> Tensor:
    """Like `output`, filled with what no kernel writes: −128, or NaN."""
    value = -128 if output.dtype == torch.int8 else float("nan")
    return torch.full_like(output, value)
