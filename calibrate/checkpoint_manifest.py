"""`qdit.json`, the manifest of a quantized checkpoint: its schema and its strict reader."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, ValidationError

from ..files import canonical_json
from .artifact_errors import (
    InvalidJsonError,
    InvalidValueError,
    MissingKeyError,
    UnknownKeyError,
    UnsupportedVersionError,
)
from .plan import QuantizationPlan
from .strict_json import parse_json_object

FORMAT: Literal["qdit-checkpoint"] = "qdit-checkpoint"
# 2 adds integer scales. A writer writes the lowest version that can say what it holds, so that
# whoever reads version 1 goes on reading all other checkpoints.
SCHEMA_VERSION: Literal[2] = 2
READ_VERSIONS = (1, SCHEMA_VERSION)
INTEGER_SCALES_VERSION: Literal[2] = 2
MANIFEST_NAME = "qdit.json"
WEIGHTS_NAME = "weights.safetensors"

# Who wrote the versions that are no longer read, so that the message can say it.
OLDER_VERSIONS = {0: "a qdit from before its first release"}

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
JsonObject = dict[str, JsonValue]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class SourceEntry(_Strict):
    """Where the full-precision model came from: `model.ModelSource`."""

    kind: str
    location: str
    sha256: Sha256 | Literal[""]
    seed: int | None


class ModelEntry(_Strict):
    """The full-precision model's description: enough to build its denoiser without weights."""

    name: str
    family: str
    config: JsonObject
    scheduler_config: JsonObject
    class_names: tuple[str, ...]
    source: SourceEntry


class LinearEntry(_Strict):
    """One quantizable linear: weight [out_features, in_features]."""

    name: str
    in_features: int = Field(ge=1)
    out_features: int = Field(ge=1)
    has_bias: bool


class WeightsEntry(_Strict):
    """The tensor file: its name in the folder, its length and the SHA-256 of its bytes."""

    file: str
    bytes: int = Field(ge=8)
    sha256: Sha256


class Provenance(_Strict):
    """Who made the checkpoint: qdit's version, the libraries', and the calibration settings."""

    qdit: str
    libraries: dict[str, str]
    settings: JsonObject


class Manifest(_Strict):
    """The whole of `qdit.json`."""

    format: Literal["qdit-checkpoint"]
    version: Literal[1, 2]
    model: ModelEntry
    plan: JsonObject
    linears: tuple[LinearEntry, ...]
    ties: dict[str, str]
    weights: WeightsEntry
    provenance: Provenance
    metrics: JsonObject

    def to_text(self) -> str:
        """Canonical JSON: equal manifests give equal bytes."""
        return canonical_json(self.model_dump(mode="json"))


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Read a manifest strictly.

    Raises, in this order: `InvalidJsonError` (`DuplicateKeyError`), `MissingKeyError` or
    `UnsupportedVersionError` for the version, then `UnknownKeyError`, `MissingKeyError` or
    `InvalidValueError` for the first key that breaks the schema.
    """
    _check_version(parse_json_object(data, where), where)
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        raise _named(error, where) from error


def _check_version(value: dict[str, Any], where: str) -> None:
    if "version" not in value:
        raise MissingKeyError(f"{where} lacks the key 'version'; is it a qdit checkpoint?")
    version = value["version"]
    if isinstance(version, bool) or not isinstance(version, int) or version < 0:
        raise InvalidValueError(f"{where}: version must be a whole number, got {version!r}")
    if version in OLDER_VERSIONS:
        raise UnsupportedVersionError(
            f"{where} has schema version {version}, written by {OLDER_VERSIONS[version]}; this "
            f"qdit reads versions {_known_versions()}: export the model again"
        )
    if version not in READ_VERSIONS:
        raise UnsupportedVersionError(
            f"{where} has schema version {version}, this qdit reads versions {_known_versions()}; "
            "upgrade qdit"
        )


def _known_versions() -> str:
    return " and ".join(map(str, READ_VERSIONS))


def schema_version(plan: QuantizationPlan) -> Literal[1, 2]:
    """The lowest schema version that can say a checkpoint of `plan`."""
    integer = any(scheme.has_integer_scales for scheme in plan.layers.values())
    return INTEGER_SCALES_VERSION if integer else 1


def _named(error: ValidationError, where: str) -> Exception:
    """The named one-line error of pydantic's first complaint."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return UnknownKeyError(f"{where} has the unknown key {key!r}; remove it or upgrade qdit")
    if first["type"] == "missing":
        return MissingKeyError(f"{where} lacks the key {key!r}; export the model again")
    if first["type"] == "json_invalid":
        return InvalidJsonError(f"{where} is not readable JSON: {first['msg']}; write it anew")
    got = repr(first["input"])
    got = got if len(got) <= 80 else got[:77] + "..."
    return InvalidValueError(f"{where}: {key}: {first['msg']}, got {got}; export the model again")
