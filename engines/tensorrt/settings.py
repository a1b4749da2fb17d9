"""How an engine is built, as frozen, checked data: part of the key under which it is reused."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ...errors import InputError
from ...export.tensorrt.versions import Features

MOST_LEVEL = 5  # of `builder_optimization_level`

ATTENTION_SURROUNDINGS, FREE_SURROUNDINGS = "attention", "free"
SURROUNDINGS = (ATTENTION_SURROUNDINGS, FREE_SURROUNDINGS)
DEFAULT_SURROUNDINGS = ATTENTION_SURROUNDINGS  # engines of another choice are built again


@dataclass(frozen=True)
class BatchProfile:
    """The batch sizes that an engine takes: any of `least` … `most`, fastest at `best`."""

    least: int = 1
    best: int = 8
    most: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.best <= self.most:
            raise InputError(
                "a batch profile must be 1 ≤ least ≤ best ≤ most, got "
                f"{self.least}/{self.best}/{self.most}; write it as 1/8/32"
            )

    @classmethod
    def parse(cls, text: str) -> BatchProfile:
        """From '1/8/32', or one number for all three. Raises `InputError`."""
        try:
            numbers = [int(part) for part in text.split("/")]
        except ValueError:
            numbers = []
        if len(numbers) == 1:
            numbers *= 3
        if len(numbers) != 3:
            raise InputError(
                f"a batch profile must look like 1/8/32 (least, best, most) or 8, got {text!r}"
            )
        return cls(*numbers)

    def __str__(self) -> str:
        return f"{self.least}/{self.best}/{self.most}"


@dataclass(frozen=True)
class BuildSettings:
    """What a builder is told.

    * `batch`: the one dynamic dimension;
    * `optimization_level`: 0 … 5, how long tactics are searched for; None leaves TensorRT's own;
    * `workspace_bytes`: most scratch memory of a layer; None leaves all of the GPU's;
    * `hardware_compatible`: runs on every GPU from Ampere on; `version_compatible`: is read by
      later TensorRTs of the same major version;
    * `weight_streaming`: weights may stay on the host (from 10.0);
    * `refit`: weights may be replaced later;
    * `allow_fallback`: a quantized linear may run in FP16 or FP32;
    * `surroundings`: what TensorRT 8.x computes in around Q/DQ nodes: attention in FP16 and the
      timestep in FP32 ('attention'), or what it chooses itself ('free'). Networks of TensorRT 10
      on are strongly typed: there it means nothing.

    Raises `InputError` for numbers out of range.
    """

    batch: BatchProfile = BatchProfile()
    optimization_level: int | None = None
    workspace_bytes: int | None = None
    hardware_compatible: bool = False
    version_compatible: bool = False
    weight_streaming: bool = False
    refit: bool = False
    allow_fallback: bool = False
    surroundings: str = DEFAULT_SURROUNDINGS

    def __post_init__(self) -> None:
        level = self.optimization_level
        if level is not None and not 0 <= level <= MOST_LEVEL:
            raise InputError(f"the optimization level must be 0 … {MOST_LEVEL}, got {level}")
        if self.workspace_bytes is not None and self.workspace_bytes < 1 << 20:
            raise InputError(
                f"the workspace must be at least 1 MiB (1048576), got {self.workspace_bytes}"
            )
        if self.surroundings not in SURROUNDINGS:
            raise InputError(
                f"surroundings must be one of {', '.join(SURROUNDINGS)}, got {self.surroundings!r}"
            )

    def check(self, features: Features) -> None:
        """Raise `InputError` for what this TensorRT cannot do, before any work."""
        if self.weight_streaming and not features.strongly_typed:
            raise InputError(
                f"weight streaming needs TensorRT 10, got {features.version}; leave it out"
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> BuildSettings:
        """The inverse of `to_json`. Raises `InputError` for what is none."""
        try:
            return cls(**{**value, "batch": BatchProfile(**value["batch"])})
        except (TypeError, KeyError) as error:
            raise InputError(f"no build settings: {error}; build the engine again") from error
