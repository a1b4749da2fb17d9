"""Evaluation by Ray actors: one on each GPU of a cluster, or on its CPUs where it has none.

The payload goes into the object store once and from there to every actor; hosts need nothing but
an installed qdit. An actor that dies, alone or with its host, is replaced.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ....errors import InputError, StepError
from ...plan import QuantizationPlan
from ..fitness import Outcome
from .dispatch import Died, Event, Finished, Ready, dispatch
from .serial import attempt, describe

if TYPE_CHECKING:
    from ..payload import EvaluatorPayload

# How long a whole search waits for a cluster that gives it no place for a single actor.
_SECONDS_FOR_A_PLACE = 600.0
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
_SMALLEST_STORE = 100 << 20  # bytes; Ray itself refuses less than 75 MiB


@dataclass
class _Worker:
    actor: Any
    task: Any  # the reference of what the actor is doing now
    ready: bool = False
    process: int = 0


class RayExecutor:
    """Actors on the cluster at `address`, or on one of `workers` CPUs or all GPUs made here.

    `workers` bounds their number. Raises `InputError` where Ray is missing or `address` does not
    answer.
    """

    def __init__(
        self, payload: EvaluatorPayload, *, address: str | None = None, workers: int | None = None
    ) -> None:
        if workers is not None and workers < 1:
            raise InputError(f"the number of workers must be at least 1, got {workers}")
        self._ray = _import_ray()
        self._payload = payload
        self._most = workers
        self._connected = False  # by this executor, which then disconnects
        self.deaths = 0
        self._alive: dict[int, _Worker] = {}
        self._started = 0
        self._actor_class: Any = None
        self._shipped: Any = None
        if address is not None and not self._ray.is_initialized():
            _connect(self._ray, address)  # now, so that a wrong address is told at once
            self._connected = True

    @property
    def workers(self) -> int:
        return len(self._alive)

    @property
    def processes(self) -> Mapping[int, int]:
        """The process id, on its host, of each actor that is ready, by the worker's number."""
        return {n: worker.process for n, worker in self._alive.items() if worker.ready}

    def evaluate(
        self, plans: Sequence[QuantizationPlan]
    ) -> Iterator[tuple[QuantizationPlan, Outcome]]:
        if not self._alive:
            self._start_all()
        return dispatch(plans, self)

    def close(self) -> None:
        """End the actors, and the cluster if it was started here."""
        for worker in self._alive.values():
            self._ray.kill(worker.actor)
        self._alive.clear()
        if self._connected:
            self._ray.shutdown()
            self._connected = False

    def idle(self) -> Sequence[int]:
        return [n for n, worker in self._alive.items() if worker.ready and worker.task is None]

    def submit(self, worker: int, plan: QuantizationPlan) -> None:
        self._alive[worker].task = self._alive[worker].actor.evaluate.remote(plan)

    def next_event(self) -> Event:
        tasks = {w.task: n for n, w in self._alive.items() if w.task is not None}
        if not tasks:
            raise StepError("the search has no workers: its executor is closed")
        waits_for_a_place = not any(worker.ready for worker in self._alive.values())
        timeout = _SECONDS_FOR_A_PLACE if waits_for_a_place else None
        done, _ = self._ray.wait(list(tasks), num_returns=1, timeout=timeout)
        if not done:
            raise StepError(
                f"the Ray cluster had no free place for a worker in {_SECONDS_FOR_A_PLACE:.0f} s; "
                "see `ray status`"
            )
        number = tasks[done[0]]
        try:
            value = self._ray.get(done[0])
        except self._ray.exceptions.RayError as error:
            return self._replace(number, describe(error))
        return self._finished(number, value)

    def _finished(self, number: int, value: Any) -> Event:
        worker = self._alive[number]
        worker.task = None
        if worker.ready:
            return Finished(number, value)
        if isinstance(value, str):
            raise StepError(f"a worker of the search could not start: {value}")
        worker.ready, worker.process = True, value
        return Ready(number)

    def _start_all(self) -> None:
        if not self._ray.is_initialized():
            _start_cluster(self._ray, self._payload, self._most)
            self._connected = True
        threads = self._payload.threads
        resources, count = _places(self._ray.cluster_resources(), threads, self._most)
        self._shipped = self._ray.put(self._payload)
        self._actor_class = self._ray.remote(**resources, max_restarts=0)(_Actor)
        for _ in range(count):
            self._start()

    def _start(self) -> None:
        actor = self._actor_class.remote(self._shipped)
        self._alive[self._started] = _Worker(actor, actor.start.remote())
        self._started += 1

    def _replace(self, number: int, reason: str) -> Died:
        self._ray.kill(self._alive.pop(number).actor)
        self.deaths += 1
        self._start()
        return Died(number, reason)


class _Actor:
    """What runs on the cluster. Its own errors come back as values: what Ray raises is death."""

    def __init__(self, payload: EvaluatorPayload) -> None:
        self._payload = payload

    def start(self) -> int | str:
        """Build the evaluator: this process's id, or why it cannot be built."""
        torch.set_num_threads(self._payload.threads)
        # Ray shows an actor its own GPU alone; one without a GPU sees none
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
        try:
            self._evaluator = self._payload.build(device)
        except Exception as error:  # the driver raises it where it is seen
            return describe(error)
        return os.getpid()

    def evaluate(self, plan: QuantizationPlan) -> Outcome:
        return attempt(self._evaluator, plan)


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "--ray-address and the executor 'ray' need Ray; install it with "
            "`pip install qdit[cluster]`"
        ) from error
    return ray


def _start_cluster(ray: Any, payload: EvaluatorPayload, workers: int | None) -> None:
    """A small cluster on this machine, without a dashboard."""
    ray.init(
        address="local",
        num_cpus=None if workers is None else workers * payload.threads,
        object_store_memory=_SMALLEST_STORE + 2 * payload.byte_size,
        include_dashboard=False,
        **_QUIET,
    )


def _connect(ray: Any, address: str) -> None:
    try:
        ray.init(address=address, **_QUIET)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(
            f"no Ray cluster answers at {address}: {describe(error)}; check --ray-address"
        ) from error


def _places(
    cluster: dict[str, float], threads: int, workers: int | None
) -> tuple[dict[str, float], int]:
    """What each actor takes, and how many actors the cluster has room for."""
    gpus = int(cluster.get("GPU", 0))
    resources: dict[str, float] = {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": threads}
    room = gpus or int(cluster.get("CPU", 0)) // threads
    if room < 1:
        raise InputError(
            f"the Ray cluster must have a GPU or {threads} CPUs, got {cluster.get('CPU', 0):g} "
            "CPUs; add a node or use fewer threads"
        )
    return resources, min(workers or room, room)
