"""The installed TensorRT and the GPU it would build for: what there is, and why there is none."""

from __future__ import annotations

import importlib
import subprocess
from dataclasses import asdict, dataclass
from typing import Any

from ...errors import InputError
from ...export.tensorrt.versions import Features, TensorRtVersion, features

_QUERY = (
    "nvidia-smi",
    "--query-gpu=name,compute_cap,driver_version",
    "--format=csv,noheader",
)


@dataclass(frozen=True)
class GpuIdentity:
    """What an engine is tied to: its name, 'compute_capability' such as '9.0', and the driver."""

    name: str
    compute_capability: str
    driver: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def tensorrt_module() -> Any:
    """The `tensorrt` package. Raises `InputError` where it is not installed or does not load."""
    try:
        return importlib.import_module("tensorrt")
    except ImportError as error:
        raise InputError(
            f"TensorRT is not installed here ({error}); install it with "
            "`pip install 'qdit[tensorrt]'`"
        ) from error


def polygraphy_backend() -> Any:
    """`polygraphy.backend.trt`. Raises `InputError` where it is not installed."""
    try:
        return importlib.import_module("polygraphy.backend.trt")
    except ImportError as error:
        raise InputError(
            f"engines are built with Polygraphy, which is not installed here ({error}); install it "
            "with `pip install 'qdit[tensorrt]'`"
        ) from error


def installed_version() -> TensorRtVersion:
    """The version of the installed TensorRT. Raises `InputError` where there is none."""
    return TensorRtVersion.parse(str(tensorrt_module().__version__))


def installed_features() -> Features:
    """What the installed TensorRT can do. Raises `InputError` where there is none."""
    return features(installed_version())


def gpu_identity(index: int = 0) -> GpuIdentity:
    """The GPU `index`, by the driver's own tool: asking CUDA would start a context here.

    Raises `InputError` where there is no NVIDIA GPU or driver.
    """
    try:
        done = subprocess.run(_QUERY, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise InputError(
            "no NVIDIA GPU answers here (nvidia-smi), and a TensorRT engine is built on the GPU "
            "that runs it; run the same command on that machine"
        ) from error
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    complete = [row for row in rows if len(row) == 3]
    if index >= len(complete):
        raise InputError(f"GPU {index} is not there, {len(complete)} found; choose another")
    return GpuIdentity(*complete[index])


def why_no_engine() -> str:
    """Why no engine can be built here, in one line; '' where it can."""
    try:
        installed_features()
        polygraphy_backend()
        gpu_identity()
    except InputError as error:
        return str(error)
    return ""
