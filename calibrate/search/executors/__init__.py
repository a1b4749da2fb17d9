"""Where candidates of a search are evaluated: in this process, on all GPUs, on a Ray cluster.

The results are the same whichever (on the same kind of device): every worker builds the same
evaluator from the same payload, with the same number of threads, and a candidate's images depend
on its plan alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import torch

from ....errors import InputError
from ...plan import QuantizationPlan
from ..fitness import Outcome

if TYPE_CHECKING:
    from ..payload import EvaluatorPayload

ExecutorKind = Literal["serial", "processes", "ray"]


class Executor(Protocol):
    """Evaluates plans. `close` ends the workers; an executor is not used after it.

    Workers are made for the first plan: where every fitness is stored already, nothing is built.
    """

    @property
    def workers(self) -> int:
        """How many candidates are evaluated at a time, once there are workers."""

    def evaluate(
        self, plans: Sequence[QuantizationPlan]
    ) -> Iterator[tuple[QuantizationPlan, Outcome]]:
        """Each plan with its outcome, as they finish. Raises `StepError` if no worker can work."""

    def close(self) -> None: ...


def make_executor(
    kind: ExecutorKind,
    payload: EvaluatorPayload,
    *,
    device: torch.device | str = "cpu",
    workers: int | None = None,
    ray_address: str | None = None,
) -> Executor:
    """The executor `kind`.

    1. 'serial': in this process, on `device`.
    2. 'processes': one process on each visible GPU where `device` is 'cuda', else `workers`
       processes on `device` (default 1).
    3. 'ray': one actor on each of the cluster's GPUs, else on its CPUs, `workers` at most.
       `ray_address` names a running cluster; None starts one on this machine.

    Raises `InputError` for an unknown kind and where Ray is not installed.
    """
    if kind not in get_args(ExecutorKind):
        raise InputError(
            f"the executor must be one of {', '.join(get_args(ExecutorKind))}, got {kind!r}"
        )
    if kind == "serial":
        from .serial import SerialExecutor

        return SerialExecutor(lambda: payload.build(device))
    if kind == "processes":
        from .processes import ProcessExecutor

        return ProcessExecutor(payload, process_devices(device, workers))
    from .ray_cluster import RayExecutor

    return RayExecutor(payload, address=ray_address, workers=workers)


def process_devices(device: torch.device | str, workers: int | None = None) -> tuple[str, ...]:
    """A device for each process: every GPU in turn for 'cuda', else `device` `workers` times."""
    wanted = torch.device(device)
    if workers is not None and workers < 1:
        raise InputError(f"the number of workers must be at least 1, got {workers}")
    if str(wanted) == "cuda":
        gpus = torch.cuda.device_count()
        if gpus == 0:
            raise InputError("no CUDA device is visible; use --device cpu")
        return tuple(f"cuda:{index}" for index in range(min(workers or gpus, gpus)))
    return (str(wanted),) * (workers or 1)
