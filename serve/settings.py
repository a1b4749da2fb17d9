"""What the operator decides: limits and timeouts, checked when they are made."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..engines.kinds.kind import AUTO
from ..engines.session_settings import CpuKernels
from ..errors import InputError
from .batching.policies import POLICY_NAMES


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class EngineLimits(_Strict):
    """Of one engine's queue. `max_batch` rows a call (None: measured at start), `max_queue` images
    at hand, seconds for a request and for a single call."""

    max_batch: int | None = Field(default=None, ge=2, le=4096)
    max_queue: int = Field(default=256, ge=1, le=100_000)
    request_timeout: float = Field(default=300.0, gt=0, le=86_400)
    call_seconds: float = Field(default=120.0, gt=0, le=86_400)
    batching: str = "step-mixed"

    @field_validator("batching")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value not in POLICY_NAMES:
            raise ValueError(f"batching must be one of {', '.join(POLICY_NAMES)}")
        return value


class RequestLimits(_Strict):
    """Of one request: images, steps, guidance, bytes of its body, seconds to send it in."""

    max_images: int = Field(default=10, ge=1, le=1000)
    max_steps: int = Field(default=250, ge=1, le=1000)
    max_guidance: float = Field(default=20.0, ge=1)
    max_body_bytes: int = Field(default=1 << 16, ge=1024)
    body_seconds: float = Field(default=10.0, gt=0)
    default_steps: int = Field(default=20, ge=1, le=1000)
    default_guidance: float = Field(default=1.5, ge=0)


class ClusterSettings(_Strict):
    """Of replicas on a Ray cluster; None everywhere where there is none.

    `replicas`: how many, 'N' or 'LEAST:MOST' to follow the load; CPUs and GPUs of each one.
    """

    ray_address: str | None = None
    replicas: str | None = Field(default=None, pattern=r"^[1-9][0-9]{0,3}(:[1-9][0-9]{0,3})?$")
    replica_cpus: float | None = Field(default=None, gt=0)
    replica_gpus: float | None = Field(default=None, ge=0)

    @field_validator("replicas", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        """A plain number comes as one: from the command line, and from a file."""
        return str(value) if type(value) is int else value

    @field_validator("replicas")
    @classmethod
    def _ascends(cls, value: str | None) -> str | None:
        least, _, most = (value or "1").partition(":")
        if most and int(most) < int(least):
            raise ValueError("LEAST:MOST must ascend")
        return value

    @property
    def replica_range(self) -> tuple[int, int]:
        """The least and the most replicas."""
        least, _, most = (self.replicas or "1").partition(":")
        return int(least), int(most or least)


class ServeSettings(_Strict):
    """One server."""

    folder: Path
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65_535)
    engine: str = AUTO
    device: str = AUTO
    threads: int | None = Field(default=None, ge=1)
    cpu_kernels: CpuKernels = "auto"
    vae: Path | None = None
    full_precision: bool = False
    api_keys: Path | None = None
    max_connections: int = Field(default=1024, ge=1)
    drain_seconds: float = Field(default=30.0, ge=0)
    ray: bool = False
    limits: EngineLimits = EngineLimits()
    requests: RequestLimits = RequestLimits()
    cluster: ClusterSettings = ClusterSettings()


SETTING_NAMES = tuple(
    name
    for model in (ServeSettings, EngineLimits, RequestLimits, ClusterSettings)
    for name in model.model_fields
    if name not in ("limits", "requests", "cluster")
)


def make_settings(**values: object) -> ServeSettings:
    """Settings from flat values. Raises `InputError` that names the first flag at fault."""
    for name in values:
        if name not in SETTING_NAMES:
            raise InputError(f"unknown option {name!r}; known are {', '.join(SETTING_NAMES)}")
    own, limits, requests, cluster = (
        {key: value for key, value in values.items() if key in model.model_fields}
        for model in (ServeSettings, EngineLimits, RequestLimits, ClusterSettings)
    )
    parts = {"limits": limits, "requests": requests, "cluster": cluster}
    try:
        settings = ServeSettings.model_validate(own | parts)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        flag = "--" + str(first["loc"][-1]).replace("_", "-")
        raise InputError(f"{flag}: {first['msg']}, got {first['input']!r}") from error
    given = settings.requests
    if given.default_steps > given.max_steps:
        raise InputError(
            f"--default-steps must be at most --max-steps {given.max_steps}, "
            f"got {given.default_steps}"
        )
    if cluster and not settings.ray:
        raise InputError(f"--{next(iter(cluster)).replace('_', '-')} needs --ray")
    return settings
