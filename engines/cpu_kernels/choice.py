"""Which products a session multiplies by: our own, or ONNX Runtime's, and then why not ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...errors import ArtifactError, InputError, QditError
from ..model_source import ModelSource
from ..session_settings import CPU, CpuKernels, checked_kernels
from .build import build_library
from .machine import library_units, machine_obstacle
from .swap import REPLACED, count_products

_LINE = "\n"
NOTHING_TO_TAKE = "the file has no grouped products for ours to take"


@dataclass(frozen=True)
class Products:
    """What multiplies grouped weights and activations in a session.

    `library` is that of our own products, which take `nodes` nodes by the instructions `units`;
    None for ONNX Runtime's own, for that `reason`, which may hold a compiler's log. As text it is
    one line for people. `is_notable`: ours could have been there, so that a reader wants to know.
    """

    library: Path | None = None
    nodes: int = 0
    units: str = ""
    reason: str = ""
    is_notable: bool = True

    @property
    def is_ours(self) -> bool:
        return self.library is not None

    @property
    def note(self) -> str:
        """The line for people, '' where nobody wants to know."""
        return str(self) if self.is_notable else ""

    def __str__(self) -> str:
        if self.is_ours:
            nodes = "1 node" if self.nodes == 1 else f"{self.nodes} nodes"
            return f"qdit's own products by {self.units} ({nodes})"
        return f"ONNX Runtime's own products: {self.reason.partition(_LINE)[0]}"


def choose_products(wanted: CpuKernels, provider: str, source: ModelSource) -> Products:
    """Our products where `provider` is the CPU's, the model has nodes for them, and the machine can
    run and compile them; else ONNX Runtime's.

    1. 'auto': ours if they can be had, else ONNX Runtime's with the reason.
    2. 'qdit': ours; `InputError` with the reason where they cannot be had.
    3. 'onnxruntime': ONNX Runtime's.

    Raises `InputError` for any other word.
    """
    if checked_kernels(wanted) == "onnxruntime":
        return Products(reason="they were asked for")
    found = _find(provider, source)
    if wanted == "qdit" and not found.is_ours:
        raise InputError(
            f"qdit's own products were asked for and cannot be used: {found.reason}; leave it to "
            "auto, which takes ONNX Runtime's then"
        )
    return found


def _find(provider: str, source: ModelSource) -> Products:
    if provider != CPU:
        why = f"the file runs by {provider}, and ours are a CPU's"
        return Products(reason=why, is_notable=False)
    if not source.mentions(REPLACED):  # most files: they are not read for it
        return Products(reason=NOTHING_TO_TAKE, is_notable=False)
    if why := machine_obstacle():
        return Products(reason=why)
    try:
        nodes = count_products(source.load())
    except ArtifactError as error:  # ONNX Runtime reads it next, and says what it makes of it
        return Products(reason=str(error))
    if nodes == 0:
        return Products(reason=NOTHING_TO_TAKE, is_notable=False)
    try:
        library = build_library()
        units = library_units(library)
    except QditError as error:
        return Products(reason=str(error))
    if not units:
        return Products(reason="the operating system gives no use of AVX512-VNNI")
    return Products(library, nodes, units)
