"""DDIM samples of a saved DiT with classifier-free guidance."""

from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel

from demo_recipe.dit import NULL_LABEL
from demo_recipe.errors import RecipeError
from demo_recipe.images import CLASS_COUNT, IMAGE_SIZE, to_bytes


class Sampler:
    """The model and scheduler of one folder, ready on ``device``."""

    def __init__(self, folder: Path, device: torch.device, bf16: bool, compiled: bool) -> None:
        for name in ("transformer/config.json", "scheduler/scheduler_config.json"):
            if not (folder / name).is_file():
                raise RecipeError(
                    f"the model folder must hold {name}, got {str(folder)!r} without it; "
                    "pass the folder that train_demo.py wrote"
                )
        model = DiTTransformer2DModel.from_pretrained(folder / "transformer")
        self.model = model.float().eval().to(device)
        self.scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
        self.device = device
        self.bf16 = bf16
        self.predict = torch.compile(self._predict, dynamic=False) if compiled else self._predict

    def _predict(
        self, images: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            output = self.model(images, timestep=timestep, class_labels=labels)
        return output.sample.float()

    def epsilon(
        self, images: torch.Tensor, timestep: int, labels: torch.Tensor, guidance: float
    ) -> torch.Tensor:
        """Guided noise of ``images`` [N, 3, 32, 32]; guidance 1 needs no unconditional half."""
        if guidance != 1.0:
            images = torch.cat([images, images])
            labels = torch.cat([labels, torch.full_like(labels, NULL_LABEL)])
        times = torch.full_like(labels, timestep)
        predicted = self.predict(images, times, labels)
        if guidance == 1.0:
            return predicted
        conditional, unconditional = predicted.chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    @torch.no_grad()
    def sample(
        self, noise: torch.Tensor, labels: torch.Tensor, steps: int, guidance: float
    ) -> torch.Tensor:
        """uint8 images on the CPU from ``noise`` [N, 3, 32, 32] and ``labels`` [N]."""
        self.scheduler.set_timesteps(steps)
        images, labels = noise.to(self.device), labels.to(self.device)
        for timestep in self.scheduler.timesteps.tolist():
            epsilon = self.epsilon(images, timestep, labels, guidance)
            images = self.scheduler.step(epsilon, timestep, images).prev_sample
        return to_bytes(images).cpu()


def draw_noise(count: int, seed: int) -> torch.Tensor:
    """float32 [count, 3, 32, 32], drawn on the CPU so that every device starts alike."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


def batches_of(noise: torch.Tensor, batch_size: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """``(noise, labels)`` parts of at most ``batch_size``; the labels run 0...9 in turn."""
    labels = torch.arange(len(noise)) % CLASS_COUNT
    return zip(noise.split(batch_size), labels.split(batch_size), strict=True)
