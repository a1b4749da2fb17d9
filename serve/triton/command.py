"""`qdit-serve --emit-triton-repository`: write a model repository instead of serving."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...progress import Progress
from ..settings import make_settings
from .config import DEFAULT_MAX_BATCH, Device
from .repository import triton_source, write_triton_repository

_FLAG = "--emit-triton-repository"
_READ = {"folder", "engine", "device", "threads", "max_batch", "max_queue"}
_DEVICES: dict[str, Device | None] = {"auto": None, "cpu": "cpu", "cuda": "cuda"}


def emit_repository(repository: Path, values: Mapping[str, Any], progress: Progress) -> None:
    """Put the model of `values["folder"]`, verified, into `repository`; `values` are the flags that
    were given. Raises `InputError` for a flag that a repository does not hold."""
    for name in set(values) - _READ:
        flag = name.replace("_", "-")
        raise InputError(f"--{flag} is not read with {_FLAG}, got {values[name]}; leave it out")
    settings = make_settings(**values)
    if settings.device not in _DEVICES:
        raise InputError(
            f"with {_FLAG} the device is auto, cpu or cuda, got {settings.device!r}; the server "
            "chooses GPUs"
        )
    source = triton_source(
        settings.folder,
        settings.engine,
        device=_DEVICES[settings.device],
        max_queue=settings.limits.max_queue,
        threads=settings.threads,
        max_batch=settings.limits.max_batch or DEFAULT_MAX_BATCH,
    )
    made = write_triton_repository(source, repository)
    model = source.model
    progress.say(
        f"wrote {made}: {source.path} on the {model.backend} backend ({model.device}), batches up "
        f"to {model.max_batch}"
    )
    progress.say(f"start it with tritonserver --model-repository={repository.resolve()}")
