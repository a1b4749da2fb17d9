"""Load what is served: an exported folder on its best engine, and full precision beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..calibrate.checkpoint import QuantizedCheckpoint
from ..calibrate.checkpoint_model import empty_denoiser
from ..calibrate.families.base import Family
from ..calibrate.sampling import SampledModel
from ..calibrate.schedulers import make_scheduler
from ..calibrate.sources import load_model
from ..calibrate.sources.vae import load_vae, vae_of_source
from ..engines.at_hand import open_engine
from ..engines.devices import resolve_device
from ..engines.kinds.kind import EngineSettings
from ..errors import InputError
from ..onnx_places import ONNXRUNTIME_CUDA_FILE, ONNXRUNTIME_FILE, QDQ_FILE
from .artifacts import check_onnx
from .cards import ModelCard
from .live_engine import LiveEngine, Opened
from .settings import ServeSettings
from .torch_threads import many_threads

FULL_PRECISION = "full-precision"
_ONNX_FILES = (
    QDQ_FILE,
    ONNXRUNTIME_FILE,
    ONNXRUNTIME_CUDA_FILE,
    *(f"tensorrt/tensorrt-{kind}.onnx" for kind in ("plugin", "int8", "int4")),
)


@dataclass(frozen=True)
class ServedModel:
    """A model ready to serve.

    `batch_sizes`: sizes that calls are padded to, none: any; `largest_batch`: most rows of a call.
    """

    card: ModelCard
    sampled: SampledModel
    engine: LiveEngine
    batch_sizes: tuple[int, ...]
    vae: nn.Module | None
    largest_batch: int | None = None


def load_models(settings: ServeSettings, say: Callable[[str], None]) -> Sequence[ServedModel]:
    """The quantized model, and full precision after it where that is asked for."""
    engine_settings = EngineSettings(settings.device, settings.threads, settings.cpu_kernels)
    served = load_served(settings.folder, settings.engine, engine_settings, settings.vae, say)
    say(f"{served.card.id}: {served.card.precision} on engine {served.card.engine}")
    if not settings.full_precision:
        return [served]
    full = load_full_precision(served, settings.folder, settings.device, settings.threads)
    say(f"{full.card.id}: full precision on {full.card.engine}")
    return [served, full]


def load_served(
    folder: Path,
    engine: str,
    settings: EngineSettings,
    vae: Path | None,
    say: Callable[[str], None],
) -> ServedModel:
    """The exported model in `folder`, verified, on `engine` ('auto': the best that opens)."""
    checkpoint = QuantizedCheckpoint.read(folder)
    for name in _ONNX_FILES:
        if (folder / name).is_file():
            check_onnx(folder / name, checkpoint)
    outline = empty_denoiser(checkpoint.family, checkpoint.config, {})
    sampled = SampledModel.of_outline(checkpoint.family, outline, checkpoint.scheduler_config)
    decoder = _vae(checkpoint, folder, vae, sampled, settings.device)
    opened = open_engine(folder, engine, settings, say=say)
    kind, family, config = opened.kind, checkpoint.family, checkpoint.config
    if note := kind.note(opened.engine):
        say(f"engine {kind.name}: {note}")
    first: list[Any] = [opened.engine]

    def open_it() -> Opened:
        # the engine that told which kind it is, then fresh ones of that kind
        one = first.pop() if first else kind.open(folder, settings)
        return Opened(one.as_denoiser(family, config), one.close)

    card = _card(
        f"{checkpoint.model_name}-{checkpoint.plan.bits.replace('/', '-')}",
        checkpoint.plan.bits,
        kind.name,
        sampled,
        family,
        config,
        checkpoint.class_names,
        decoder,
    )
    largest = kind.largest_batch(opened.engine)
    live = LiveEngine(open_it, sampled)
    return ServedModel(card, sampled, live, kind.batch_sizes, decoder, largest)


def load_full_precision(
    served: ServedModel, folder: Path, device: str, threads: int | None = None
) -> ServedModel:
    """The full-precision model that `folder` was made from, in PyTorch, to be looked at beside it.

    `threads` are the CPU's, None: as many as torch chooses.
    Raises `InputError` where the place that the checkpoint names no longer holds that model.
    """
    checkpoint = QuantizedCheckpoint.read(folder)
    source = checkpoint.source
    where = resolve_device(device)
    model = load_model(source.location, device=where, seed=source.seed or 0)
    if model.source.sha256 != source.sha256:
        raise InputError(
            f"{source.location} is not the model that {folder} was made from "
            f"(SHA-256 {model.source.sha256[:12]}, recorded {source.sha256[:12]}); "
            "serve without --full-precision"
        )
    call = model.as_denoiser()

    def denoiser(x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        given = (value.to(where) for value in (x, timesteps, labels))
        with many_threads(threads):
            return call(*given).to(x)

    card = _card(
        checkpoint.model_name,
        FULL_PRECISION,
        "torch-fp32",
        served.sampled,
        model.family,
        checkpoint.config,
        checkpoint.class_names,
        served.vae,
    )
    engine = LiveEngine(lambda: Opened(denoiser, lambda: None), served.sampled)
    return ServedModel(card, served.sampled, engine, (), served.vae)


def _vae(
    checkpoint: QuantizedCheckpoint,
    folder: Path,
    given: Path | None,
    sampled: SampledModel,
    device: str,
) -> nn.Module | None:
    """The decoder of a latent-space model: --vae, vae/ in the folder, or the model's own."""
    channels = sampled.sample_shape[0]
    where = resolve_device(device)
    if given is not None:
        decoder = load_vae(given, where)
        if decoder is None:
            raise InputError(f"--vae must name a folder with an AutoencoderKL, got {given}")
        return decoder
    decoder = load_vae(folder / "vae", where)
    if decoder is None and channels != 3:
        decoder = vae_of_source(checkpoint.source, where)
    if decoder is None and channels != 3:
        raise InputError(
            f"{folder} predicts latents of {channels} channels and needs a VAE to make images; "
            "name its folder with --vae"
        )
    return decoder


def _card(
    name: str,
    precision: str,
    engine: str,
    sampled: SampledModel,
    family: Family,
    config: dict[str, Any],
    class_names: tuple[str, ...],
    vae: nn.Module | None,
) -> ModelCard:
    _, height, width = sampled.sample_shape
    enlarged = 1 if vae is None else 2 ** (len(_blocks_of(vae)) - 1)
    patch = int(config.get("patch_size", 1))
    schedulers = schedulers_of(sampled.scheduler_config)
    return ModelCard(
        id=name,
        created=int(time.time()),
        precision=precision,
        engine=engine,
        class_count=sampled.class_count,
        class_names=class_names if len(class_names) == sampled.class_count else (),
        width=width * enlarged,
        height=height * enlarged,
        tokens=(height // patch) * (width // patch),
        schedulers=schedulers,
        default_scheduler=type(make_scheduler(sampled.scheduler_config)).__name__,
    )


def _blocks_of(vae: nn.Module) -> tuple[int, ...]:
    config: Any = vae.config
    return tuple(config.block_out_channels)


def schedulers_of(scheduler_config: dict[str, Any]) -> tuple[str, ...]:
    """The diffusers schedulers that can be made of this config with what is installed here."""
    from diffusers.schedulers import KarrasDiffusionSchedulers

    return tuple(
        member.name
        for member in KarrasDiffusionSchedulers
        if _can_be_made(scheduler_config, member.name)
    )


def _can_be_made(scheduler_config: dict[str, Any], name: str) -> bool:
    from ..calibrate.schedulers import set_steps

    try:
        set_steps(make_scheduler(scheduler_config, name), 10)
    except InputError:
        return False
    return True
