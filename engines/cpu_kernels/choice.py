"""Which products a session multiplies by: our own, or ONNX Runtime's, and then why not ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from ...errors import ArtifactError, InputError, QditError
from ..session_settings import CPU
from .build import build_library
from .machine import library_units, machine_obstacle
from .swap import count_products

if TYPE_CHECKING:
    import onnx

CpuKernels = Literal["auto", "qdit", "onnxruntime"]
NOTHING_TO_TAKE = "the file has no MatMulNBits at accuracy level 4"


@dataclass(frozen=True)
class Products:
    """What multiplies grouped weights and activations in a session.

    `library` is that of our own products, which take `nodes` nodes by the instructions `units`;
    None for ONNX Runtime's own, for that `reason`. As text it is one line for people.
    """

    library: Path | None = None
    nodes: int = 0
    units: str = ""
    reason: str = ""

    @property
    def is_ours(self) -> bool:
        return self.library is not None

    @property
    def is_notable(self) -> bool:
        """Whether the file has products that could be ours, so that a reader wants to know."""
        return self.is_ours or self.reason != NOTHING_TO_TAKE

    def __str__(self) -> str:
        if self.is_ours:
            return f"qdit's own products by {self.units} ({self.nodes} nodes)"
        return f"ONNX Runtime's own products: {self.reason}"


def choose_products(
    wanted: CpuKernels, provider: str, load: Callable[[], onnx.ModelProto]
) -> Products:
    """Our products where `provider` is the CPU's, the model (`load`) has nodes for them, and the
    machine can run and compile them; else ONNX Runtime's.

    1. 'auto': ours if they can be had, else ONNX Runtime's with the reason.
    2. 'qdit': ours; `InputError` with the reason where they cannot be had.
    3. 'onnxruntime': ONNX Runtime's.

    Raises `InputError` for any other word.
    """
    if wanted not in get_args(CpuKernels):
        raise InputError(
            f"CPU kernels are one of {', '.join(get_args(CpuKernels))}, got {wanted!r}"
        )
    if wanted == "onnxruntime":
        return Products(reason="they were asked for")
    found = _find(provider, load)
    if wanted == "qdit" and not found.is_ours:
        raise InputError(
            f"qdit's own products were asked for and cannot be used: {found.reason}; leave it to "
            "auto, which takes ONNX Runtime's then"
        )
    return found


def _find(provider: str, load: Callable[[], onnx.ModelProto]) -> Products:
    if provider != CPU:
        return Products(reason=f"the file runs by {provider}, and ours are a CPU's")
    if why := machine_obstacle():
        return Products(reason=why)
    try:
        nodes = count_products(load())
    except ArtifactError as error:  # ONNX Runtime reads it next, and says what it makes of it
        return Products(reason=str(error))
    if nodes == 0:
        return Products(reason=NOTHING_TO_TAKE)
    try:
        library = build_library()
        units = library_units(library)
    except QditError as error:
        return Products(reason=" ".join(str(error).split()))
    if not units:
        return Products(reason="the operating system gives no use of AVX512-VNNI")
    return Products(library, nodes, units)
