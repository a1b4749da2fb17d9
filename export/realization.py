"""What a target makes of one linear: its form, and the scheme that this computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ..calibrate.plan import LinearSpec
from ..calibrate.schemes import LayerScheme

Form = Literal[
    "float",
    "int8",
    "int8-split",
    "nbits",
    "nbits-split",
    "nbits-float",
    "nbits-float16",
    "dequantized",
    "qdq",
]


@dataclass(frozen=True)
class Realization:
    """The `form` of one linear in a target's file.

    `scheme` is what the file computes: the plan's own, or the same weights with finer activation
    groups. `reason` says why it is not the plan's own in an operator of the target's.
    """

    form: Form
    scheme: LayerScheme
    reason: str = ""

    def is_exact(self, planned: LayerScheme) -> bool:
        """Whether the file computes what the plan says, but for the order of sums."""
        return self.scheme == planned

    def is_native(self) -> bool:
        """Whether the target's own operators run it; else it is as in the reference."""
        return self.form != "qdq"


Realize = Callable[[LinearSpec, LayerScheme], Realization]


def as_in_the_reference(spec: LinearSpec, scheme: LayerScheme) -> Realization:
    """`qdq`: standard operators compute every scheme that a plan can hold."""
    return Realization("qdq" if scheme.quantizes_weights else "float", scheme)
