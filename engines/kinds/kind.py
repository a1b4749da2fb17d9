"""What a kind of engine is: a way to run an exported folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ...calibrate.families.base import Denoiser, Family
from ..engine import Engine
from ..session_settings import CpuKernels

AUTO = "auto"


class SamplingEngine(Engine, Protocol):
    """An engine that the sampling loop can call."""

    def as_denoiser(self, family: Family, config: dict[str, Any]) -> Denoiser:
        """This engine as a denoiser; `config` is the denoiser's."""


@dataclass(frozen=True)
class EngineSettings:
    """Where an engine is to run, and how. `device`: auto, cpu, cuda or cuda:N; `threads`: of the
    CPU; `cpu_kernels`: what multiplies on a CPU, where the kind has a choice of it."""

    device: str = AUTO
    threads: int | None = None
    cpu_kernels: CpuKernels = "auto"


@dataclass(frozen=True)
class EngineKind:
    """A way to run an exported folder.

    * `obstacle`: why this kind cannot run the folder on this machine, or None;
    * `open`: load it; raises `InputError` where it cannot after all;
    * `batch_sizes`: sizes that callers should pad to, ascending, where every new size costs a
      capture or a build; empty where any size will do;
    * `largest_batch`: the most rows that an opened engine takes, None where there is no limit;
    * `has_cpu_kernels`: whether it reads that setting; others refuse all but 'auto';
    * `note`: what an opened engine has to say of itself, '' for nothing.
    """

    name: str
    summary: str
    obstacle: Callable[[Path, EngineSettings], str | None]
    open: Callable[[Path, EngineSettings], SamplingEngine]
    batch_sizes: tuple[int, ...] = ()
    largest_batch: Callable[[SamplingEngine], int | None] = lambda engine: None
    has_cpu_kernels: bool = False
    note: Callable[[SamplingEngine], str] = lambda engine: ""
