"""Drive an ahead-of-time plugin as TensorRT's builder does, through the real Python plugin layer.

A builder owns three things that no Python code can make: dimension expressions, the lists of them
that an output's shape is, and the expressions that go to a launch. They are stood in for here;
everything between them and the plugin's own functions is `tensorrt.plugin`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

Sizes = Sequence[int | str]  # a name is a size that follows from the batch
Symbols = Mapping[str, Callable[[int], int]]  # what these are, for a batch


class Expression:
    """A dimension expression: a number, or a function of the batch."""

    def __init__(self, value: Callable[[int], int], constant: bool) -> None:
        self.at = value
        self._constant = constant

    def is_constant(self) -> bool:
        return self._constant

    def get_constant_value(self) -> int:
        assert self._constant
        return self.at(0)


class Builder:
    """`IExprBuilder`: every operation that TensorRT documents."""

    def __init__(self, trt: Any) -> None:
        operation = trt.DimensionOperation
        self._operations: dict[Any, Callable[[int, int], int]] = {
            operation.SUM: lambda a, b: a + b,
            operation.SUB: lambda a, b: a - b,
            operation.PROD: lambda a, b: a * b,
            operation.MAX: max,
            operation.MIN: min,
            operation.EQUAL: lambda a, b: int(a == b),
            operation.LESS: lambda a, b: int(a < b),
            operation.FLOOR_DIV: lambda a, b: a // b,
            operation.CEIL_DIV: lambda a, b: -(-a // b),
        }

    def constant(self, value: int) -> Expression:
        return Expression(lambda _: value, True)

    def operation(self, kind: Any, first: Expression, second: Expression) -> Expression:
        work = self._operations[kind]
        constant = first.is_constant() and second.is_constant()
        return Expression(lambda batch: work(first.at(batch), second.at(batch)), constant)


class Setter(list[Any]):
    """`ISymExprs`: grows when it is told how many there are."""

    @property
    def nbSymExprs(self) -> int:  # noqa: N802 - TensorRT's name
        return len(self)

    @nbSymExprs.setter
    def nbSymExprs(self, count: int) -> None:  # noqa: N802
        self[:] = [None] * count


@contextmanager
def stood_in(trt: Any) -> Iterator[None]:
    """The three C++ types replaced, while a plugin is driven."""
    tensor = importlib.import_module("tensorrt.plugin._tensor")

    def symbol(value: Any) -> SimpleNamespace:
        assert isinstance(value, tensor.SymInt32)
        return SimpleNamespace(expr=value._expr)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trt, "IDimensionExpr", Expression)
        patch.setattr(trt, "DimsExprs", lambda count: [None] * count)
        patch.setattr(tensor, "SymExprImpl", symbol)
        yield


@dataclass(frozen=True)
class Compiled:
    """What a plugin gave for one tactic; sizes are evaluated for a batch."""

    kernel: bytes | str
    ptx: bytes
    launch: Any
    arguments: list[Any]

    def grid(self, batch: int) -> tuple[int, int, int]:
        launch = self.launch
        return tuple(e.expr.at(batch) for e in (launch.grid_x, launch.grid_y, launch.grid_z))  # type: ignore[return-value]

    def threads(self, batch: int) -> int:
        launch = self.launch
        assert launch.block_y.expr.at(batch) == launch.block_z.expr.at(batch) == 1
        return int(launch.block_x.expr.at(batch))

    def shared_bytes(self, batch: int) -> int:
        return int(self.launch.shared_mem.expr.at(batch))

    def scalars(self, batch: int) -> tuple[int, ...]:
        return tuple(argument.expr.at(batch) for argument in self.arguments)


class AotDriver:
    """One plugin instance, made by its creator with its fields, at a batch profile."""

    def __init__(
        self,
        trt: Any,
        name: str,
        kind: str,
        inputs: Sequence[Sizes],
        types: Sequence[Any],
        symbols: Symbols,
        profile: tuple[int, int, int] = (1, 8, 32),
    ) -> None:
        self.trt, self.symbols, self.profile = trt, symbols, profile
        creator = trt.get_plugin_registry().get_creator(name, "1", "qdit")
        field = trt.PluginField("kind", kind.encode(), trt.PluginFieldType.CHAR)
        self.plugin = creator.create_plugin(
            name,
            "qdit",
            trt.PluginFieldCollection([field]),
            trt.TensorRTPhase.BUILD,
            trt.QuickPluginCreationRequest.STRICT_AOT,
        )
        self.builder = Builder(trt)
        self.input_shapes = [self._expressions(sizes) for sizes in inputs]
        ranks = [len(sizes) for sizes in inputs]
        self.input_types = list(types)
        self.output_types = self.plugin.get_output_data_types(self.input_types, ranks)
        self.output_shapes = self.plugin.get_output_shapes(self.input_shapes, [], self.builder)
        shapes = [*self.input_shapes, *self.output_shapes]
        kinds = [*self.input_types, *self.output_types]
        self.descs = [self._desc(*pair) for pair in zip(shapes, kinds, strict=True)]
        self.combinations = self.plugin.get_supported_format_combinations(self.descs, len(inputs))
        self.plugin.configure_plugin(self.descs[: len(inputs)], self.descs[len(inputs) :])
        self.tactics = self.plugin.get_valid_tactics()

    def outputs_at(self, batch: int) -> list[tuple[int, ...]]:
        return [tuple(size.at(batch) for size in shape) for shape in self.output_shapes]

    def compile(self, tactic: int) -> Compiled:
        count = len(self.input_shapes)
        self.plugin.set_tactic(tactic)
        launch, setter = SimpleNamespace(), Setter()
        self.plugin.get_launch_params(
            self.input_shapes, self.descs, count, launch, setter, self.builder
        )
        descs = [desc.desc for desc in self.descs]
        kernel, ptx = self.plugin.get_kernel(descs[:count], descs[count:])
        return Compiled(kernel, ptx, launch, list(setter))

    def _expressions(self, sizes: Sizes) -> list[Expression]:
        return [
            Expression(self.symbols[size], False)
            if isinstance(size, str)
            else self.builder.constant(size)
            for size in sizes
        ]

    def _desc(self, shape: Sequence[Expression], kind: Any) -> Any:
        trt = self.trt
        desc = trt.DynamicPluginTensorDesc()
        inner = trt.PluginTensorDesc()
        inner.dims = trt.Dims([s.at(0) if s.is_constant() else -1 for s in shape])
        inner.type, inner.format = kind, trt.TensorFormat.LINEAR
        desc.desc = inner
        least, best, most = ([size.at(batch) for size in shape] for batch in self.profile)
        desc.min, desc.opt, desc.max = trt.Dims(least), trt.Dims(best), trt.Dims(most)
        return desc
