"""The training loop of the DiT: one compiled loss, no synchronisation within a step."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from demo_recipe.batches import BatchSource
from demo_recipe.checkpoint import Counters, load_checkpoint, save_checkpoint
from demo_recipe.diffusion import Objective
from demo_recipe.errors import RecipeError
from demo_recipe.images import ImageSet
from demo_recipe.optimizers import build_optimizer
from demo_recipe.progress import Reporter

OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class TrainSettings:
    """How the DiT is trained; the run ends at ``steps`` or ``minutes``, whichever comes first."""

    steps: int | None = None
    minutes: float | None = 12.5
    batch_size: int = 1024
    optimizer: str = "muon"
    learning_rate: float = 8e-4
    weight_decay: float = 0.01
    warmup: float = 0.03
    gradient_clip: float = 1.0
    ema_decay: float = 0.9995
    label_dropout: float = 0.1
    min_snr: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that cannot be trained with."""
        if self.optimizer not in OPTIMIZERS:
            raise RecipeError(
                f"--optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}"
            )
        if self.steps is None and self.minutes is None:
            raise RecipeError("a run needs an end, got none; pass --steps, --minutes or both")
        for name in ("steps", "minutes", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                option = name.replace("_", "-")
                raise RecipeError(f"--{option} must be above 0, got {value}; pass a larger one")
        if not 0 <= self.seed < 2**40:
            raise RecipeError(f"--seed must lie between 0 and 2**40, got {self.seed}")

    def progress(self, step: int, seconds: float) -> float:
        """The share of the run (0...1) that is behind in the middle of step ``step``."""
        by_step = (step + 0.5) / self.steps if self.steps else 0.0
        by_time = seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(by_step, by_time))

    def rate(self, progress: float) -> float:
        """Learning rate: linear warm-up over the share ``warmup``, then cosine to zero."""
        if progress < self.warmup:
            return self.learning_rate * progress / self.warmup
        share = (progress - self.warmup) / (1 - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * share))

    def ended(self, counters: Counters) -> bool:
        """Whether the steps or the minutes are used up."""
        steps_done = self.steps is not None and counters.step >= self.steps
        return steps_done or (self.minutes is not None and counters.seconds >= 60 * self.minutes)


class Trainer:
    """Model, EMA, optimizer and data of one run, and its checkpoint file."""

    def __init__(
        self,
        model: DiTTransformer2DModel,
        train: ImageSet,
        settings: TrainSettings,
        checkpoint: Path,
        compiled: bool = False,
    ) -> None:
        self.device = train.images.device
        self.model = model.to(self.device)
        self.settings = settings
        self.checkpoint = checkpoint
        self.parameters = dict(model.named_parameters())
        self.average = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.batches = BatchSource(
            train, settings.batch_size, settings.label_dropout, settings.seed
        )
        self.optimizer = build_optimizer(model, settings.optimizer, settings.weight_decay)
        objective: nn.Module = Objective(model, settings.min_snr).to(self.device)
        self.objective = torch.compile(objective, dynamic=False) if compiled else objective
        self.loss_sum = torch.zeros((), device=self.device)
        self.loss_count = 0
        self.counters = Counters()

    def run(self, checkpoint_minutes: float = 2.0, log_every: int = 100) -> Counters:
        """Train to the end and leave the EMA weights in ``model``; a checkpoint is continued."""
        if self.checkpoint.exists():
            self._load()
        saved = time.monotonic()
        with Reporter("dit") as reporter, fast_matmul():
            clock = Clock(self.counters.seconds, self.device)
            while not self.settings.ended(self.counters):
                self._step()
                self.counters.seconds = clock.read()
                if self.counters.step % log_every == 0 or self.settings.ended(self.counters):
                    self._log()
                self._report(reporter)
                if time.monotonic() - saved >= 60 * checkpoint_minutes:
                    self.save()
                    saved = time.monotonic()
        self._use_average()
        return self.counters

    def _step(self) -> None:
        counters = self.counters
        batch = self.batches.draw(counters.step)
        loss = self.objective(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.gradient_clip)
        progress = self.settings.progress(counters.step, counters.seconds)
        self.optimizer.step(self.settings.rate(progress))
        for parameter in self.parameters.values():
            parameter.grad = None
        self._average(counters.step)
        self.loss_sum += loss.detach()
        self.loss_count += 1
        counters.step += 1

    @torch.no_grad()
    def _average(self, step: int) -> None:
        """Move the EMA; its horizon grows with the steps until it is that of ``ema_decay``."""
        decay = min(self.settings.ema_decay, (1 + step) / (10 + step))
        averages, values = list(self.average.values()), list(self.parameters.values())
        torch._foreach_lerp_(averages, values, 1 - decay)

    def _log(self) -> None:
        """Add the mean loss since the last row; the only synchronisation besides checkpoints."""
        loss = (self.loss_sum / max(self.loss_count, 1)).item()
        if not math.isfinite(loss):
            raise RecipeError(
                f"the training loss must stay finite, got {loss} at step {self.counters.step}; "
                "start over with --no-resume and a smaller --learning-rate"
            )
        self.counters.history.append([self.counters.step, loss, self.counters.seconds])
        self.loss_sum.zero_()
        self.loss_count = 0

    def _report(self, reporter: Reporter) -> None:
        counters = self.counters
        if self.settings.ended(counters):
            done = 1.0
        else:
            done = self.settings.progress(counters.step - 1, counters.seconds)
        loss = f"loss {counters.history[-1][1]:.4f}" if counters.history else "loss -"
        pace = counters.step / counters.seconds if counters.seconds > 0 else 0.0
        reporter.update(done, f"step {counters.step}  {loss}  {pace:.1f} steps/s")

    def save(self) -> None:
        """Write the checkpoint: model, EMA, optimizer, random state, loss sum and counters."""
        tensors = {f"model.{name}": value for name, value in self.parameters.items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        tensors |= self.optimizer.tensors()
        tensors["generator"] = self.batches.generator.get_state()
        tensors["loss_sum"] = self.loss_sum
        tensors["loss_count"] = torch.tensor(self.loss_count)
        save_checkpoint(self.checkpoint, tensors, self.counters)

    @torch.no_grad()
    def _load(self) -> None:
        tensors, self.counters = load_checkpoint(self.checkpoint)
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"model.{name}"])
            self.average[name].copy_(tensors[f"average.{name}"])
        self.optimizer.load(tensors)
        self.batches.generator.set_state(tensors["generator"])
        self.loss_sum.copy_(tensors["loss_sum"])
        self.loss_count = int(tensors["loss_count"])

    @torch.no_grad()
    def _use_average(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(self.average[name])


class Clock:
    """Training seconds: those before this process plus its own, without its first step.

    The first step waits for the compiler, which is no part of the training time.
    """

    def __init__(self, before: float, device: torch.device) -> None:
        self.before = before
        self.device = device
        self.start: float | None = None

    def read(self) -> float:
        """Seconds of training up to now."""
        if self.start is None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.start = time.monotonic()
        return self.before + time.monotonic() - self.start


@contextmanager
def fast_matmul() -> Iterator[None]:
    """Let what stays in float32 use TF32 within the block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
