"""A small ResNet classifier whose global average pool gives the features for FID."""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from demo_recipe.images import CLASS_COUNT, ImageSet, to_unit_range
from demo_recipe.progress import Reporter

FEATURE_COUNT = 256
PADDING = 4


@dataclass(frozen=True)
class ExtractorSettings:
    """How the classifier is trained; ``learning_rate`` is the peak of a one-cycle schedule."""

    epochs: int = 60
    batch_size: int = 512
    learning_rate: float = 0.2
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    seed: int = 0


def conv_block(inputs: int, outputs: int) -> nn.Sequential:
    """3x3 convolution, batch norm, ReLU: [N, inputs, H, W] to [N, outputs, H, W]."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Residual(nn.Module):
    """Two convolution blocks added to their input, [N, C, H, W] to the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = conv_block(channels, channels)
        self.second = conv_block(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(self.first(x))


class Extractor(nn.Module):
    """Images [N, 3, 32, 32] in -1...1 to features [N, 256] and logits [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_block(3, 48),
            conv_block(48, 96),
            nn.MaxPool2d(2),
            Residual(96),
            conv_block(96, 192),
            nn.MaxPool2d(2),
            conv_block(192, FEATURE_COUNT),
            nn.MaxPool2d(2),
            Residual(FEATURE_COUNT),
        )
        self.head = nn.Linear(FEATURE_COUNT, CLASS_COUNT)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.body(images).mean(dim=(2, 3))
        return features, self.head(features)


def one_cycle(progress: float, peak: float, rise: float = 0.2) -> float:
    """Learning rate at ``progress`` 0...1: linear up to ``peak``, then cosine to zero."""
    if progress < rise:
        return peak * progress / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - rise) / (1 - rise)))


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random crops and flips of padded uint8 images [N, 3, 40, 40] to [N, 3, 32, 32]."""
    count, size = images.shape[0], images.shape[-1] - 2 * PADDING
    device = images.device
    top, left = torch.randint(
        0, 2 * PADDING + 1, (2, count, 1), device=device, generator=generator
    ).unbind()
    steps = torch.arange(size, device=device)
    flip = torch.rand(count, 1, device=device, generator=generator) < 0.5
    rows = (top + steps)[:, None, :, None]
    columns = torch.where(flip, left + steps.flip(0), left + steps)[:, None, None, :]
    item = torch.arange(count, device=device)[:, None, None, None]
    channel = torch.arange(images.shape[1], device=device)[None, :, None, None]
    return images[item, channel, rows, columns]


def train_extractor(
    train: ImageSet, settings: ExtractorSettings, device: torch.device
) -> tuple[Extractor, float]:
    """Train on ``train`` (already on ``device``); return the network in eval mode and seconds."""
    start = time.monotonic()
    torch.manual_seed(settings.seed)
    generator = torch.Generator(device).manual_seed(settings.seed)
    network = Extractor().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=0.0,
        momentum=0.9,
        weight_decay=settings.weight_decay,
        nesterov=True,
    )
    padded = F.pad(train.images, (PADDING,) * 4)
    batch_size = min(settings.batch_size, len(train))
    total = settings.epochs * (len(train) // batch_size)
    step = 0
    with Reporter("extractor") as reporter:
        for _ in range(settings.epochs):
            order = torch.randperm(len(train), device=device, generator=generator)
            for index in order.split(batch_size)[: len(train) // batch_size]:
                rate = one_cycle((step + 1) / total, settings.learning_rate)
                optimizer.param_groups[0]["lr"] = rate
                images = to_unit_range(augment(padded[index], generator))
                loss = _loss(network, images, train.labels[index], settings.label_smoothing)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                step += 1
                reporter.update(step / total, f"step {step}/{total}")
    network.eval()
    return network, time.monotonic() - start


def _loss(
    network: Extractor, images: torch.Tensor, labels: torch.Tensor, smoothing: float
) -> torch.Tensor:
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        _, logits = network(images)
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


@torch.no_grad()
def extract(network: Extractor, images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, 256] and logits [N, 10] of uint8 images [N, 3, 32, 32], in full float32."""
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        parts = [
            [output.cpu() for output in network(to_unit_range(batch))]
            for batch in images.split(1000)
        ]
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    features, logits = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    return features, logits


def accuracy(network: Extractor, images: ImageSet) -> float:
    """Share of ``images`` that the network classifies correctly, 0...1."""
    _, logits = extract(network, images.images)
    return float((logits.argmax(axis=1) == images.labels.cpu().numpy()).mean())
