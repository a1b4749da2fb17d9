"""What a person asks for, checked before any work starts.

The commands and config files build these. Heavy imports wait until they are needed, so that
`--help` answers at once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..calibrate.plan import QuantizationPlan, read_plan, uniform_plan
from ..calibrate.schemes import (
    ActivationGroup,
    LayerScheme,
    ScaleDtype,
    ScaleFormat,
    WeightGroup,
    preset_bits,
)
from ..errors import InputError
from .session_settings import CpuKernels, parse_provider_options, parse_session_options
from .targets.options import TargetOptions

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same reader under its older name
    import tomli as tomllib

if TYPE_CHECKING:
    from ..calibrate.model import DiffusionModel
    from ..calibrate.sampling import SamplingSettings

WeightMethod = Literal["gptq", "mse", "nearest"]
ComputeDtype = Literal["float32", "float16"]
EngineName = Literal[
    "onnxruntime",
    "onnxruntime-target",
    "onnxruntime-cuda",
    "torch",
    "tensorrt",
    "tensorrt-plugin",
    "tensorrt-int8",
    "tensorrt-int4",
]
SearchMethod = Literal["none", "sensitivity", "evolutionary"]


class Options(BaseModel):
    """Frozen, and unknown keys are refused: a misspelt config key must not be ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SchemeOptions(Options):
    """The flags that `qdit-export` and `qdit-bench` share: how the linears are quantized."""

    bits: str = "w4a8"
    group_size: WeightGroup = 128
    activation_group_size: ActivationGroup | None = None
    symmetric: bool = True
    weight_symmetric: bool | None = None
    activation_symmetric: bool | None = None
    scale_dtype: ScaleDtype = "float16"
    scale_format: ScaleFormat = "float"
    plan: Path | None = None

    @field_validator("bits")
    @classmethod
    def _known_preset(cls, value: str) -> str:
        weight_bits, activation_bits = preset_bits(value)
        return f"w{weight_bits}a{activation_bits}"

    def scheme(self) -> LayerScheme:
        """The uniform scheme of the flags; the activation group follows the weight group.

        Raises `InputError` for flags that make no scheme, or whose scale format means nothing.
        """
        weight_bits, activation_bits = preset_bits(self.bits)
        activation_group = self.activation_group_size
        if activation_group is None:
            activation_group = "token" if self.group_size == "channel" else self.group_size
        scheme = LayerScheme(
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            weight_group=self.group_size,
            activation_group=activation_group,
            weight_symmetric=_first(self.weight_symmetric, self.symmetric),
            activation_symmetric=_first(self.activation_symmetric, self.symmetric),
            scale_dtype=self.scale_dtype,
            scale_format=self.scale_format,
        )
        if scheme.scale_format != self.scale_format:
            raise InputError(
                f"integer scales are those of weight groups, got --bits {self.bits} --group-size "
                f"{self.group_size}; use weights of 4 bits or fewer in groups of 32 … 1152, or "
                "leave --scale-format out"
            )
        return scheme

    def plan_for(self, model: DiffusionModel) -> QuantizationPlan:
        """The plan of these flags for a model; `--plan FILE` overrides single layers."""
        linears = model.linears
        plan = uniform_plan(self.bits, self.scheme(), linears)
        return plan if self.plan is None else read_plan(self.plan, plan, linears)


class ProofOptions(Options):
    """The flags of the proof: how images are sampled and what the gate allows."""

    num_inference_steps: int = Field(20, ge=1, le=1000)
    guidance_scale: float = Field(1.5, ge=1.0, le=100.0)
    scheduler: str | None = None
    fid_samples: int | None = Field(None, ge=0, le=1_000_000)
    fid_features: Path | None = None
    reference: Path | None = None
    max_fid_increase: float | None = Field(None, ge=0.0)
    device: str = "auto"
    batch_size: int | None = Field(None, ge=1, le=4096)
    threads: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0, lt=2**31)

    @field_validator("fid_features", "reference")
    @classmethod
    def _existing(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_file():
            raise InputError(f"no such file: {value}; give the path of an existing file")
        return value

    def sampling(self) -> SamplingSettings:
        from ..calibrate.sampling import SamplingSettings

        return SamplingSettings(
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            seed=self.seed,
            scheduler=self.scheduler,
        )


class ValidateOptions(ProofOptions):
    """The flags of a proof of an exported folder. `engine` is the one that is proven."""

    engine: EngineName = "onnxruntime"
    provider: str | None = None
    session_option: tuple[str, ...] = ()
    provider_option: tuple[str, ...] = ()
    cpu_kernels: CpuKernels = "auto"

    @field_validator("session_option")
    @classmethod
    def _parsed_options(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        parse_session_options(value)
        return value

    @field_validator("provider_option")
    @classmethod
    def _parsed_provider_options(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        parse_provider_options(value)
        return value

    def check_engine(self) -> None:
        """Raise `InputError` for flags that the engine would not read."""
        read = {"provider", "session_option", "provider_option", "cpu_kernels"}
        given = read & self.model_fields_set
        if given and not self.engine.startswith("onnxruntime"):
            flag = min(given).replace("_", "-")
            raise InputError(
                f"--{flag} is read by ONNX Runtime, got --engine {self.engine}; leave it out"
            )


class SearchOptions(Options):
    """The flags of the granularity search. `search` None means 'sensitivity' where a budget or a
    front is asked for, and 'none' elsewhere."""

    search: SearchMethod | None = None
    budget: str = "effective-bits=g128"
    pareto: bool = False
    search_images: int | None = Field(None, ge=1, le=1_000_000)
    search_refine: int | None = Field(None, ge=1, le=1000)
    refine_by: Literal["psnr", "fid"] = "psnr"
    search_population: int = Field(50, ge=2, le=10_000)
    search_generations: int = Field(10, ge=0, le=10_000)
    search_workers: int | None = Field(None, ge=1, le=4096)
    ray_address: str | None = None
    latency_target: Literal["qdq", "onnxruntime", "torch", "torch-quantized"] = "qdq"

    @property
    def search_method(self) -> SearchMethod:
        if self.search is not None:
            return self.search
        return "sensitivity" if {"budget", "pareto"} & self.model_fields_set else "none"

    def check_search(self) -> None:
        """Raise `InputError` for flags that the chosen method would not read."""
        from ..calibrate.search.budget import parse_budget

        kind = parse_budget(self.budget).kind
        method = self.search_method
        for name in _READ_BY:
            if name in self.model_fields_set and method not in _READ_BY[name]:
                flag = name.replace("_", "-")
                raise InputError(
                    f"--{flag} is read by --search {' or '.join(_READ_BY[name])}, got --search "
                    f"{method}; change one of them"
                )
        if "latency_target" in self.model_fields_set and kind != "latency-ms":
            raise InputError(
                f"--latency-target is read by a budget of latency-ms, got --budget {self.budget}; "
                "change one of them"
            )
        judged = (self.search_refine or (3 if method == "sensitivity" else 1)) > 1
        if "refine_by" in self.model_fields_set and not judged:
            raise InputError(
                "--refine-by judges two plans or more, got --search-refine "
                f"{self.search_refine or 1}; raise it or leave --refine-by out"
            )
        if method != "none" and self.model_fields_set & {"plan"}:
            raise InputError(
                f"a plan is either given or searched for, got --plan and --search {method}; "
                "leave one of them out"
            )


_READ_BY: dict[str, tuple[SearchMethod, ...]] = {
    "budget": ("sensitivity", "evolutionary"),
    "pareto": ("sensitivity",),
    "search_images": ("sensitivity", "evolutionary"),
    "search_refine": ("sensitivity", "evolutionary"),
    "refine_by": ("sensitivity", "evolutionary"),
    "search_population": ("evolutionary",),
    "search_generations": ("evolutionary",),
    "search_workers": ("evolutionary",),
    "ray_address": ("evolutionary",),
    "latency_target": ("sensitivity", "evolutionary"),
}


class ExportOptions(SchemeOptions, ProofOptions, SearchOptions, TargetOptions):
    """Everything `qdit-export` takes."""

    model: str | None = None
    weights: WeightMethod = "gptq"
    calib_samples: int = Field(256, ge=1, le=100_000)
    dtype: ComputeDtype = "float32"
    opset: int = 21
    output: Path | None = None
    resume: bool = True


def _first(given: bool | None, default: bool) -> bool:
    return default if given is None else given


def build_options(kind: type[Options], values: dict[str, Any]) -> Any:
    """Validate `values`; the first problem becomes a one-line `InputError`."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"][:1]) or "options"
        known = ", ".join(sorted(kind.model_fields))
        if problem["type"] == "extra_forbidden":
            raise InputError(f"unknown option {where!r}; the options are {known}") from error
        raise InputError(
            f"{where.replace('_', '-')}: {problem['msg'].lower()}, got {problem['input']!r}"
        ) from error


def read_config(path: Path) -> dict[str, Any]:
    """Options from a .toml or .json file, keys as the long flags are, '-' or '_' alike."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            values = tomllib.loads(text)
        elif path.suffix == ".json":
            values = json.loads(text)
        else:
            raise InputError(f"a config file must end in .toml or .json, got {path.name}")
    except OSError as error:
        raise InputError(f"cannot read the config file {path}: {error.strerror}") from error
    except ValueError as error:  # both decoders raise subclasses of it
        raise InputError(f"{path} is not valid {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold one table of options, got {type(values).__name__}")
    return {str(key).replace("-", "_"): value for key, value in values.items()}
