"""A plugin's launch for given sizes, in plain numbers: what TensorRT evaluates from expressions.

With it the ahead-of-time kernels are launched through the CUDA driver alone, without TensorRT
(`tests/engines/tensorrt/test_plugin_cuda.py`, `benchmarks/tensorrt_plugin.py`). A test holds it
against the expressions of the real plugin layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from ...kernels.driver import Gpu
from .launch import Launch
from .plugins import Plugin


class _Sizes(tuple[int, ...]):
    """A shape without dynamic sizes."""

    is_dynamic = False


@dataclass(frozen=True)
class _Tensor:
    """What `plugins.py` asks of a descriptor."""

    shape: _Sizes

    @property
    def shape_expr(self) -> _Sizes:
        return self.shape


# The functions of `tensorrt.plugin` that the plugins call.
_NUMBERS = SimpleNamespace(cdiv=lambda size, step: -(-size // step), min=min)


def numeric_tactics(
    plugin: Plugin, shapes: Mapping[str, Sequence[int]], kind: str, gpu: Gpu
) -> list[int]:
    """The tactics for these input shapes, by the kernel's parameter names."""
    return plugin.tactics(_tensors(shapes), kind, gpu)


def numeric_launch(
    plugin: Plugin, shapes: Mapping[str, Sequence[int]], kind: str, tactic: int, gpu: Gpu
) -> Launch:
    """The launch for these input shapes: grid and scalars are numbers."""
    return plugin.launch(_NUMBERS, _tensors(shapes), kind, tactic, gpu)


def _tensors(shapes: Mapping[str, Sequence[int]]) -> dict[str, _Tensor]:
    return {name: _Tensor(_Sizes(shape)) for name, shape in shapes.items()}
