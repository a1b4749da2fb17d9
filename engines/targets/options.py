"""The flags of `--target`: which runtimes get a file of their own, and how engines are built."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ...errors import InputError
from ...export.capabilities import TARGETS
from ...export.tensorrt.versions import TensorRtVersion, features
from ..tensorrt.settings import MOST_LEVEL, BatchProfile, BuildSettings

BEST = "tensorrt"  # the best of the TensorRT targets that version and plan allow
REFERENCE = "qdq"  # always written, asked for or not
_MIB = 1 << 20


class TargetOptions(BaseModel):
    """What `qdit-export` takes for its targets. Frozen; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: tuple[str, ...] = ()
    on_unsupported: Literal["stop", "degrade"] = "stop"
    tensorrt_version: str | None = None
    static_scales: Literal["mse", "max"] = "mse"
    smooth: float | None = Field(None, ge=0.0, le=1.0)
    batch_profile: str = "1/8/32"
    optimization_level: int | None = Field(None, ge=0, le=MOST_LEVEL)
    workspace_mib: int | None = Field(None, ge=1)
    hardware_compatible: bool = False
    version_compatible: bool = False
    weight_streaming: bool = False
    refit: bool = False
    allow_fallback: bool = False
    require_engine: bool = False

    @field_validator("target", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """'tensorrt-int8,tensorrt-int4', or a list of names in a config file."""
        if isinstance(value, str):
            return tuple(name.strip() for name in value.split(",") if name.strip())
        return value

    @field_validator("target")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        known = (*TARGETS, BEST)
        for position, name in enumerate(value):
            if name not in known:
                raise InputError(f"target must be one of {', '.join(known)}, got {name!r}")
            if name in TARGETS and not TARGETS[name].built:
                raise InputError(f"target {name} is not written by this version of qdit yet")
            if name in value[:position]:
                raise InputError(f"target {name} is named twice; name each target once")
        return value

    @field_validator("tensorrt_version", "batch_profile", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        """10 and 8.6 are numbers on a command line and in a config file."""
        return str(value) if isinstance(value, int | float) else value

    @field_validator("tensorrt_version")
    @classmethod
    def _parsed(cls, value: str | None) -> str | None:
        if value is not None:
            features(TensorRtVersion.parse(value))
        return value

    @field_validator("batch_profile")
    @classmethod
    def _profile(cls, value: str) -> str:
        BatchProfile.parse(value)
        return value

    @property
    def wants_tensorrt(self) -> bool:
        return any(name.startswith(BEST) for name in self.target)

    def build_settings(self) -> BuildSettings:
        """What the builder is told."""
        return BuildSettings(
            batch=BatchProfile.parse(self.batch_profile),
            optimization_level=self.optimization_level,
            workspace_bytes=None if self.workspace_mib is None else self.workspace_mib * _MIB,
            hardware_compatible=self.hardware_compatible,
            version_compatible=self.version_compatible,
            weight_streaming=self.weight_streaming,
            refit=self.refit,
            allow_fallback=self.allow_fallback,
        )

    def check_targets(self) -> None:
        """Raise `InputError` for flags that no target of the list would read."""
        for name in sorted(_BUILDER_FLAGS & self.model_fields_set):
            if not self.wants_tensorrt:
                flag = name.replace("_", "-")
                raise InputError(
                    f"--{flag} is read by TensorRT targets, got --target "
                    f"{','.join(self.target) or 'none'}; add one, such as --target tensorrt"
                )


_BUILDER_FLAGS = frozenset(TargetOptions.model_fields) - {"target", "on_unsupported"}
