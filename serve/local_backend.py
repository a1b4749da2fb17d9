"""Images made in this process: one worker thread and one engine a model."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from ..calibrate.sampling import SamplingSettings, Trajectory
from ..errors import InputError
from .backend import Generation, Health, ImageUpdate, ProgressUpdate, Update
from .batch_size import fitting_batch_size
from .batching.jobs import Job, Listener
from .batching.mixer import StepMixer
from .batching.policies import make_policy
from .batching.worker import Bounds, Observer, State, Worker
from .cards import ModelCard
from .errors import BadRequestError, UnknownModelError
from .images import encode_sample
from .served_model import ServedModel
from .settings import EngineLimits
from .updates import Updates

log = logging.getLogger("qdit.serve")

_SECONDS_TO_STOP = 10.0
_SECONDS_PAST_THE_DEADLINE = 5.0  # the worker tells of it itself unless a call hangs
_IMAGES_MADE_AT_ONCE = 2  # their noise takes less time than a way to a thread and back
_MOST_ENCODERS = 16


def _encoder_threads() -> int:
    return min(os.cpu_count() or 1, _MOST_ENCODERS)


class LocalBackend:
    """Serves `models`; `observers` count, by model id, what happens to each."""

    def __init__(
        self,
        models: Sequence[ServedModel],
        limits: EngineLimits,
        observers: Mapping[str, Observer],
    ) -> None:
        self._models = {model.card.id: model for model in models}
        self._cards = {name: model.card for name, model in self._models.items()}
        self._encoders = ThreadPoolExecutor(_encoder_threads(), "encoder")
        self._limits = limits
        self._workers = {
            name: _start_worker(model, limits, observers[name])
            for name, model in self._models.items()
        }

    @property
    def cards(self) -> Mapping[str, ModelCard]:
        return self._cards

    @property
    def images(self) -> int:
        """Images of all models that were asked for and are not made."""
        return sum(worker.images for worker in self._workers.values())

    async def generate(self, generation: Generation) -> AsyncGenerator[Update, None]:
        model = self._models.get(generation.model)
        if model is None:
            raise UnknownModelError(f"no model {generation.model!r} is loaded", "model")
        worker = self._workers[generation.model]
        encode = partial(
            encode_sample,
            vae=model.vae,
            image_format=generation.image_format,
            quality=generation.quality,
        )
        updates = Updates(encode, self._encoders)
        if generation.images <= _IMAGES_MADE_AT_ONCE:
            job = _job_of(generation, model, updates.tell)
        else:
            job = await asyncio.to_thread(_job_of, generation, model, updates.tell)
        worker.submit(job)
        try:
            yield ProgressUpdate(0, job.steps, None)  # it is accepted
            left = generation.images
            while left:
                update = await updates.next(job.deadline + _SECONDS_PAST_THE_DEADLINE)
                left -= isinstance(update, ImageUpdate) and update.preview is None
                yield update
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
        self._encoders.shutdown(wait=False)


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
