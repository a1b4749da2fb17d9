"""Served models: one of a function for everything that is not the engine, one exported for real."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from torch import Tensor

from qdit.calibrate.checkpoint import QuantizedCheckpoint
from qdit.calibrate.plan import uniform_plan
from qdit.calibrate.quantizers import quantize_weight_nearest
from qdit.calibrate.sampling import SampledModel
from qdit.calibrate.schemes import LayerScheme
from qdit.calibrate.sources import load_model
from qdit.calibrate.sources.schedulers import default_scheduler_config
from qdit.export.qdq import export_qdq
from qdit.serve.cards import ModelCard
from qdit.serve.live_engine import LiveEngine, Opened
from qdit.serve.served_model import ServedModel
from qdit.serve.settings import ServeSettings, make_settings

PATIENCE = 20.0
SHAPE = (3, 8, 8)
CLASS_NAMES = ("airplane", "cat", "crane, bird", "crane, machine", "tench, Tinca tinca")
SAMPLED = SampledModel(SHAPE, len(CLASS_NAMES), len(CLASS_NAMES), default_scheduler_config())
CARD = ModelCard(
    id="fake-w4a8",
    created=1,
    precision="w4a8",
    engine="fake",
    class_count=len(CLASS_NAMES),
    class_names=CLASS_NAMES,
    width=8,
    height=8,
    tokens=16,
    schedulers=("DDIMScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"),
    default_scheduler="DDIMScheduler",
)


@dataclass
class Switches:
    """How a fake engine behaves: tests turn them while it serves."""

    seconds: float = 0.0
    broken: bool = False
    failures: int = 0  # so many calls fail, then none
    reopens: int = 0
    gate: threading.Event = field(default_factory=threading.Event)
    rows: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gate.set()


def fake_model(switches: Switches, name: str = CARD.id) -> ServedModel:
    def denoise(x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        switches.rows.append(len(x))
        assert switches.gate.wait(PATIENCE)
        time.sleep(switches.seconds)
        if switches.broken or switches.failures:
            switches.failures = max(0, switches.failures - 1)
            raise RuntimeError("device lost")
        shift = (labels * 0.01 + timesteps * 1e-4)[:, None, None, None]
        return (x * 0.9 + shift).tanh()

    def open_it() -> Opened:
        switches.reopens += 1
        return Opened(denoise, lambda: None)

    card = CARD if name == CARD.id else ModelCard(**{**CARD.__dict__, "id": name})
    return ServedModel(card, SAMPLED, LiveEngine(open_it, SAMPLED), (), None)


def settings_for(folder: Path = Path("none"), **changes: object) -> ServeSettings:
    return make_settings(**({"folder": folder, "port": 0, "max_batch": 8} | changes))


@pytest.fixture
def switches() -> Switches:
    return Switches()


@dataclass(frozen=True)
class Running:
    """A server in a thread of this process."""

    url: str
    stop: Callable[[], None]
    images: Callable[[], int]
    stopped: threading.Event


@contextmanager
def running_server(
    models: list[ServedModel], keys: tuple[str, ...] = (), **changes: object
) -> Iterator[Running]:
    """uvicorn with the real app, workers and batcher at a free port."""
    from qdit.serve.web.local import make_local_app
    from qdit.serve.web.security import ApiKeys
    from qdit.serve.web.server import Server, address_of, bind

    settings = settings_for(**changes)
    started, stopped = threading.Event(), threading.Event()
    with bind("127.0.0.1", 0) as bound:
        local = make_local_app(settings, models, ApiKeys(keys))
        server = Server(
            local.app,
            local.gate,
            local.backend.close,
            drain_seconds=settings.drain_seconds,
            max_connections=settings.max_connections,
            started=started.set,
        )

        async def run() -> None:
            try:
                await server.serve(sockets=[bound])
            finally:
                await local.backend.close()
                stopped.set()

        thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
        thread.start()
        assert started.wait(PATIENCE)
        yield Running(address_of(bound), server.stop, lambda: local.backend.images, stopped)
        server.stop()
        thread.join(PATIENCE)
        assert not thread.is_alive()


@pytest.fixture
def server(switches: Switches) -> Iterator[Running]:
    with running_server([fake_model(switches)]) as running:
        yield running
        switches.gate.set()


def eventually(condition: Callable[[], object], patience: float = PATIENCE) -> None:
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's first block, w4a8 g64 by rounding: a real checkpoint and `model.onnx`."""
    folder = tmp_path_factory.mktemp("served")
    model = load_model(None, blocks=1)
    scheme = LayerScheme(weight_bits=4, activation_bits=8, weight_group=64, activation_group=64)
    plan = uniform_plan("w4a8", scheme, model.linears)
    weights = {
        spec.name: quantize_weight_nearest(
            model.denoiser.get_submodule(spec.name).weight, plan[spec.name]
        )
        for spec in model.linears
    }
    checkpoint = QuantizedCheckpoint.from_result(model, plan, weights, {}, {})
    checkpoint.write(folder)
    export_qdq(QuantizedCheckpoint.read(folder), folder / "model.onnx")
    return folder
