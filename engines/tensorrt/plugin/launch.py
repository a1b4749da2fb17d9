"""What TensorRT is told to launch: one kernel, its definitions, its grid, its integers.

Symbolic: rows, and what follows from them, are TensorRT's shape expressions (`tensorrt.plugin`),
because a plugin is compiled once and launched for every batch size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# A number, or a `tensorrt.plugin.ShapeExpr`.
Size = Any
Tensors = Mapping[str, Any]  # `tensorrt.plugin.TensorDesc` by the kernel's parameter names


@dataclass(frozen=True)
class Launch:
    """One launch. scalars: the kernel's 32-bit parameters between inputs and outputs, in order."""

    file: str
    entry: str
    defines: dict[str, int]
    shared_bytes: int
    threads: int
    grid: tuple[Size, Size]
    scalars: tuple[Size, ...]


def rows_of(trtp: Any, x: Any) -> Size:
    """M of x [..., K]: the product of all sizes but the last."""
    count = x.shape_expr[0]
    for index in range(1, len(x.shape_expr) - 1):
        count = count * x.shape_expr[index]
    return count


def rounded_up(trtp: Any, size: Size, step: int) -> Size:
    return trtp.cdiv(size, step) * step


def expected_rows(x: Any) -> list[int]:
    """M at the profile's best and largest batch; one number where nothing is dynamic."""
    shape = x.shape
    profiles = [shape.opt, shape.max] if shape.is_dynamic else [tuple(shape)]
    return list(dict.fromkeys(_product(sizes[:-1]) for sizes in profiles))


def _product(sizes: Any) -> int:
    made = 1
    for size in sizes:
        made *= int(size)
    return made
