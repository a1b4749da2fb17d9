"""Which device to run on, and what it takes at a time."""

from __future__ import annotations

import torch

from ..errors import InputError

_BATCH = {"cpu": 16, "cuda": 64}


def resolve_device(name: str) -> str:
    """'auto' → 'cuda' where there is one; a device that is not there is an `InputError`."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, colon, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (colon and (kind == "cpu" or not index.isdigit())):
        raise InputError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {name!r} is not there ({torch.cuda.device_count()} CUDA devices found); "
            "use --device cpu"
        )
    return name


def default_batch_size(device: str) -> int:
    """Samples in one call where `--batch-size` does not say."""
    return _BATCH[device.partition(":")[0]]
