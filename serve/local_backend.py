"""Images made in this process: one worker thread and one engine a model."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from functools import partial

from torch import Tensor, nn

from ..calibrate.sampling import SamplingSettings, Trajectory
from ..errors import InputError
from .backend import Generation, Health, ImageUpdate, ProgressUpdate, Update
from .batch_size import fitting_batch_size
from .batching.jobs import Event, Failed, Finished, Job, Listener, Preview, Progress
from .batching.mixer import StepMixer
from .batching.policies import make_policy
from .batching.worker import Bounds, Observer, State, Worker
from .cards import ModelCard
from .errors import BadRequestError, RequestTimeoutError, ServeError, UnknownModelError
from .images import encode_sample
from .served_model import ServedModel
from .settings import EngineLimits

log = logging.getLogger("qdit.serve")

_SECONDS_TO_STOP = 10.0
_SECONDS_PAST_THE_DEADLINE = 5.0  # the worker tells of it itself unless a call hangs


class LocalBackend:
    """Serves `models`; `observers` count, by model id, what happens to each."""

    def __init__(
        self,
        models: Sequence[ServedModel],
        limits: EngineLimits,
        observers: Mapping[str, Observer],
    ) -> None:
        self._models = {model.card.id: model for model in models}
        self._limits = limits
        self._workers = {
            name: _start_worker(model, limits, observers[name])
            for name, model in self._models.items()
        }

    @property
    def cards(self) -> Mapping[str, ModelCard]:
        return {name: model.card for name, model in self._models.items()}

    @property
    def images(self) -> int:
        """Images of all models that were asked for and are not made."""
        return sum(worker.images for worker in self._workers.values())

    async def generate(self, generation: Generation) -> AsyncGenerator[Update, None]:
        model = self._models.get(generation.model)
        if model is None:
            raise UnknownModelError(f"no model {generation.model!r} is loaded", "model")
        worker = self._workers[generation.model]
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()
        tell = partial(_tell, loop, events)
        job = await asyncio.to_thread(_job_of, generation, model, tell)
        worker.submit(job)
        try:
            yield ProgressUpdate(0, job.steps, None)  # it is accepted
            while True:
                event = await _next_event(events, job.deadline)
                yield await _update_of(event, generation, model.vae)
                if isinstance(event, Finished) and event.is_last:
                    return
        finally:
            worker.cancel(job)  # does nothing to a job that has ended

    async def health(self) -> Health:
        workers = self._workers.items()
        stalled = [
            name for name, worker in workers if worker.seconds_in_call > self._limits.call_seconds
        ]
        states = {
            name: "stalled" if name in stalled else worker.state.value for name, worker in workers
        }
        takes = [worker.state in (State.READY, State.RECOVERING) for _, worker in workers]
        return Health(live=not stalled, ready=all(takes) and not stalled, states=states)

    async def close(self) -> None:
        for name, worker in self._workers.items():
            stopped = await asyncio.to_thread(worker.stop, _SECONDS_TO_STOP)
            if stopped:
                self._models[name].engine.close()
            else:
                log.error("the engine of %s is still in a call and is left to the system", name)


def _start_worker(model: ServedModel, limits: EngineLimits, observer: Observer) -> Worker:
    rows = limits.max_batch or fitting_batch_size(model)
    if model.largest_batch is not None and rows > model.largest_batch:
        raise InputError(
            f"the engine {model.card.engine} takes at most {model.largest_batch} rows a call, got "
            f"--max-batch {rows}; build it with another --batch-profile"
        )
    mixer = StepMixer(
        model.engine.denoise,
        max_rows=rows,
        clock=time.monotonic,
        batch_sizes=model.batch_sizes,
        policy=make_policy(limits.batching),
    )
    bounds = Bounds(limits.max_queue, limits.request_timeout)
    worker = Worker(mixer, model.engine, observer, bounds, name=f"batcher {model.card.id}")
    worker.start()
    log.info("%s: engine %s, %d rows a call", model.card.id, model.card.engine, rows)
    return worker


def _job_of(generation: Generation, model: ServedModel, tell: Listener) -> Job:
    """The job with its noise and schedulers; `BadRequestError` where they cannot be made."""
    try:
        settings = SamplingSettings(
            generation.steps, generation.guidance, generation.seed, generation.scheduler
        )
        count = model.sampled.class_count
        trajectories = [
            Trajectory(model.sampled, settings, [generation.label + image * count])
            for image in range(generation.images)
        ]
    except InputError as error:
        raise BadRequestError(str(error), "num_inference_steps") from error
    return Job(
        trajectories,
        tell,
        deadline=time.monotonic() + generation.seconds,
        previews=generation.previews,
        tells_progress=generation.tells_progress,
    )


def _tell(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], event: Event) -> None:
    with suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(events.put_nowait, event)


async def _next_event(events: asyncio.Queue[Event], deadline: float) -> Event:
    patience = deadline + _SECONDS_PAST_THE_DEADLINE - time.monotonic()
    try:
        event = await asyncio.wait_for(events.get(), timeout=max(patience, 0))
    except asyncio.TimeoutError as error:  # not TimeoutError before Python 3.11
        raise RequestTimeoutError(
            "the engine gave no sign of life in this request's time"
        ) from error
    if isinstance(event, Failed):
        raise _fresh(event.error)
    return event


def _fresh(error: ServeError) -> ServeError:
    """The error for this request alone: raising adds to an exception, and a batch shares one."""
    made = type(error)(*error.args)
    made.__cause__ = error.__cause__
    return made


async def _update_of(event: Event, generation: Generation, vae: nn.Module | None) -> Update:
    if isinstance(event, Progress):
        return ProgressUpdate(event.step, event.steps, event.eta)
    if isinstance(event, Preview | Finished):
        preview = event.ordinal if isinstance(event, Preview) else None
        return ImageUpdate(event.image, preview, await _encoded(event.sample, generation, vae))
    raise AssertionError(f"no update for {event}")


async def _encoded(sample: Tensor, generation: Generation, vae: nn.Module | None) -> bytes:
    return await asyncio.to_thread(
        encode_sample, sample, vae, generation.image_format, generation.quality
    )
