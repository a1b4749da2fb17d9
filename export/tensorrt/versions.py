"""What TensorRT versions differ in, as far as files are concerned: one place for all of it.

Source: the parser's own code and tables (github onnx/onnx-tensorrt, branches 8.6-EA, 8.6-GA and
10.1-GA, and the table of 10.15), NVIDIA's guides for 10 and 11, and the attributes of the bindings
8.6.0, 10.0.1, 10.16.1 and 11.4.0. What was run, and on which version, is in docs/tensorrt.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ...errors import InputError


class TensorRtVersion(NamedTuple):
    """A version, compared part by part: '8.6.0' → (8, 6, 0); '10' → (10, 0, 0)."""

    major: int
    minor: int = 0
    patch: int = 0

    @classmethod
    def parse(cls, text: str) -> TensorRtVersion:
        """From '8.6', '10.16.1.11' or '11.4.0.106'. Raises `InputError` for anything else."""
        parts = text.strip().split("+")[0].split(".")
        try:
            numbers = [int(part) for part in parts[:3]]
        except ValueError as error:
            raise InputError(
                f"a TensorRT version must look like 8.6, 10.9 or 11, got {text!r}"
            ) from error
        return cls(*numbers)

    def __str__(self) -> str:
        return ".".join(map(str, self))


@dataclass(frozen=True)
class Features:
    """What a version reads. `newest_opset` is the newest that its documents name."""

    version: TensorRtVersion
    newest_opset: int
    strongly_typed: bool  # whether networks are, here: 8.x takes flags, 10 both, 11 only types
    int8_weights: bool  # constants of INT8 under DequantizeLinear, rather than quantized floats
    half_scales: bool  # scales of Q/DQ in float16
    blocks: bool  # INT4 and blocked DequantizeLinear
    functions: bool  # local functions
    plugins: bool  # quickly deployable plugins, ahead of time
    zero_point_needed: bool


_OLDEST = TensorRtVersion(8, 6)
_TEN = TensorRtVersion(10)
# 10.9 came with `aot_impl`.
_AHEAD_OF_TIME = TensorRtVersion(10, 9)
# 10.15's table names opset 24. 10.1's names 20, but its code reads INT4 and the blocked operators
# of opset 21 and is built with ONNX 1.16, which has them; what lies between is taken to be alike.
_OPSETS = ((TensorRtVersion(10, 15), 24), (_TEN, 21), (_OLDEST, 17))


def features(version: TensorRtVersion) -> Features:
    """The features of a version. Raises `InputError` below 8.6."""
    if version < _OLDEST:
        raise InputError(f"TensorRT must be {_OLDEST} or newer, got {version}; upgrade it")
    modern = version >= _TEN
    return Features(
        version=version,
        newest_opset=next(opset for since, opset in _OPSETS if version >= since),
        strongly_typed=modern,
        int8_weights=modern,
        half_scales=modern,
        blocks=modern,
        functions=modern,
        plugins=version >= _AHEAD_OF_TIME,
        zero_point_needed=not modern,
    )
