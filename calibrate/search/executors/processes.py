"""Evaluation by spawned processes: one a GPU, or several on the CPU.

Each process gets the payload as its argument, once, builds its evaluator and then receives plans
over a pipe. The pipe breaks when either side dies, so that a killed worker is noticed at once and
the workers of a killed driver end by themselves.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

import torch

from ....errors import StepError
from ...plan import QuantizationPlan
from ..fitness import Outcome
from .dispatch import Died, Event, Finished, Ready, dispatch
from .serial import attempt, describe

if TYPE_CHECKING:
    from ..payload import EvaluatorPayload

_SECONDS_TO_END = 10.0


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    device: str
    ready: bool = False
    busy: bool = False


class ProcessExecutor:
    """One process on each of `devices` ('cuda:0', 'cuda:1', … or 'cpu', 'cpu')."""

    def __init__(self, payload: EvaluatorPayload, devices: Sequence[str]) -> None:
        self._payload = payload
        self._context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._alive: dict[int, _Worker] = {}
        self._started = 0
        self._devices = tuple(devices)
        self.deaths = 0

    @property
    def workers(self) -> int:
        return len(self._devices)

    @property
    def processes(self) -> Mapping[int, int]:
        """The process id of each worker that lives now, by the worker's number."""
        return {n: worker.process.pid or 0 for n, worker in self._alive.items()}

    def evaluate(
        self, plans: Sequence[QuantizationPlan]
    ) -> Iterator[tuple[QuantizationPlan, Outcome]]:
        if not self._alive:
            for device in self._devices:
                self._start(device)
        return dispatch(plans, self)

    def close(self) -> None:
        """End the workers: asked first, then killed."""
        for worker in self._alive.values():
            worker.connection.close()  # the worker reads the end of its pipe and returns
            if worker.busy or not worker.ready:
                worker.process.terminate()
        for worker in self._alive.values():
            _end(worker.process)
        self._alive.clear()

    def idle(self) -> Sequence[int]:
        return [n for n, worker in self._alive.items() if worker.ready and not worker.busy]

    def submit(self, worker: int, plan: QuantizationPlan) -> None:
        self._alive[worker].busy = True
        try:
            self._alive[worker].connection.send(plan)
        except OSError:  # it died while idle: next_event reads the end of the pipe
            return

    def next_event(self) -> Event:
        if not self._alive:
            raise StepError("the search has no workers: its executor is closed")
        connections = {worker.connection: n for n, worker in self._alive.items()}
        first: Any = wait(list(connections))[0]
        number = connections[first]
        try:
            kind, value = first.recv()
        except (EOFError, OSError):
            return self._replace(number)
        worker = self._alive[number]
        if kind == "ready":
            worker.ready = True
            return Ready(number)
        if kind == "refused":
            raise StepError(f"a worker of the search could not start: {value}")
        worker.busy = False
        return Finished(number, value)

    def _start(self, device: str) -> None:
        mine, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(theirs, self._payload, device), name="qdit-search", daemon=True
        )
        process.start()
        theirs.close()  # held by the worker alone, so that its death ends the pipe
        self._alive[self._started] = _Worker(process, mine, device)
        self._started += 1

    def _replace(self, number: int) -> Died:
        worker = self._alive.pop(number)
        worker.connection.close()
        _end(worker.process)
        self.deaths += 1
        self._start(worker.device)
        return Died(number, f"its process ended with exit code {worker.process.exitcode}")


def _end(process: BaseProcess) -> None:
    process.join(_SECONDS_TO_END)
    if process.is_alive():
        process.kill()
        process.join()


def _serve(connection: Connection, payload: EvaluatorPayload, device: str) -> None:
    """A worker's life: build, then evaluate what comes until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    torch.set_num_threads(payload.threads)
    try:
        evaluator = payload.build(device)
    except Exception as error:  # the driver raises it where it is seen
        connection.send(("refused", describe(error)))
        return
    try:
        connection.send(("ready", None))
        while True:
            connection.send(("finished", attempt(evaluator, connection.recv())))
    except (EOFError, OSError):  # the driver closed the pipe or died
        return
