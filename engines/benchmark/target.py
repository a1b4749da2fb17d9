"""What a target is: a parent's side that makes its files, and a worker's side that runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from ..session_settings import CpuKernels

if TYPE_CHECKING:  # the worker of an ONNX target must not load torch: it would count as its memory
    from .operator_times import OperatorTime
    from .subject import Subject

Inputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class RunSettings:
    """What every worker is told: `device` 'cpu', 'cuda' or 'cuda:N', and CPU `threads`.

    The others are for what runs in ONNX Runtime: the execution provider in place of the device's,
    entries of its session configuration, options of the provider, and, for the file that has
    products of grouped weights and activations, what multiplies them on a CPU.
    """

    device: str
    threads: int
    provider: str | None = None
    session_options: dict[str, str] = field(default_factory=dict)
    provider_options: dict[str, str] = field(default_factory=dict)
    cpu_kernels: CpuKernels = "auto"


@dataclass(frozen=True)
class Prepared:
    """What a target's parent side hands to its worker: plain JSON values.

    `file_bytes` is the size of the files that this way of running needs, None where it needs none
    of its own and the worker reports the bytes of the weights that it holds instead.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    file_bytes: int | None = None


class Runner(Protocol):
    """A loaded target, in its worker process."""

    device: str
    weight_bytes: int | None

    def bind(self, inputs: Inputs) -> None:
        """Take the inputs of the runs to come: numpy arrays by name, batch first."""

    def run(self) -> None:
        """One denoiser call on the bound inputs; returns when the output is there."""

    def output(self) -> np.ndarray:
        """The last run's output [batch, C, H, W] as float32 on the host."""

    def device_memory(self) -> int | None:
        """Peak bytes allocated on the accelerator since the last `bind`; None on a CPU."""


@runtime_checkable
class Profiled(Protocol):
    """A runner whose runtime says where a call's time goes."""

    def profile(self) -> list[OperatorTime]:
        """Some untimed calls on the bound inputs under the runtime's profiler, longest first."""


@runtime_checkable
class NamesProducts(Protocol):
    """A runner that may multiply grouped weights and activations in more than one way."""

    @property
    def products(self) -> str | None:
        """What does, in a line; None where the file has no such products."""


class Target(Protocol):
    """One way of running the denoiser. Stateless: the same class serves parent and worker."""

    def prepare(self, subject: Subject, folder: Path) -> Prepared:
        """In the parent, once: write the files that the worker needs into `folder`."""

    def load(self, prepared: Prepared, settings: RunSettings) -> Runner:
        """In the worker: load what `prepare` left."""
