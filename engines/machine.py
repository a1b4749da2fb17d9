"""What a figure was measured on: processor, memory, GPUs, system and library versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil

LIBRARIES = (
    "qdit",
    "torch",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnx",
    "diffusers",
    "numpy",
    "triton",
    "tensorrt",
)
# Instruction sets that decide how fast low-precision products are on a CPU.
_PRODUCT_FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "sve",
)
_GPU_QUERY = (
    "nvidia-smi",
    "--query-gpu=name,driver_version,memory.total",
    "--format=csv,noheader,nounits",
)


def describe_machine() -> dict[str, Any]:
    """Facts as JSON values: cpu, cores, memory_bytes, gpus, os, python, versions.

    `cores` are those this process may use (affinity counted), `summary` is one line for tables.
    """
    gpus = _gpus()
    cpu, cores = _cpu_name(), usable_cores()
    memory = psutil.virtual_memory().total
    accelerators = "".join(f", {gpu['name']}" for gpu in gpus)
    return {
        "summary": f"{cpu}, {cores} cores, {memory / 2**30:.0f} GiB{accelerators}",
        "cpu": cpu,
        "cpu_features": _cpu_features(),
        "cores": cores,
        "physical_cores": psutil.cpu_count(logical=False),
        "memory_bytes": memory,
        "gpus": gpus,
        "os": _os_name(),
        "python": platform.python_version(),
        "versions": library_versions(),
    }


def usable_cores() -> int:
    """Logical cores that the scheduler may give this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_average() -> float:
    """Runnable processes, averaged over the last minute: above a few tenths others are at work."""
    return psutil.getloadavg()[0]


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that decide results and speed; absent ones left out."""
    found = {name: _version(name) for name in LIBRARIES}
    return {name: version for name, version in found.items() if version is not None}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpuinfo(*keys: str) -> str:
    """The first value in /proc/cpuinfo under one of `keys`; '' where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpu_features() -> list[str]:
    present = set(_cpuinfo("flags", "Features").split())
    return [flag for flag in _PRODUCT_FLAGS if flag in present]


def _os_name() -> str:
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return platform.platform()
    return (
        f"{release.get('PRETTY_NAME', platform.system())}, {platform.system()} {platform.release()}"
    )


def _gpus() -> list[dict[str, Any]]:
    """NVIDIA GPUs by the driver's own tool: asking torch would start a CUDA context here."""
    try:
        done = subprocess.run(_GPU_QUERY, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return [
        {"name": name, "driver": driver, "memory_bytes": int(memory) * 2**20}
        for name, driver, memory in (row for row in rows if len(row) == 3)
        if memory.isdigit()
    ]
