"""The training objective: min-SNR weighted epsilon loss on stratified timesteps."""

import torch
from torch import nn

from demo_recipe.dit import BETA_END, BETA_START, TRAIN_TIMESTEPS
from demo_recipe.images import to_unit_range


class Objective(nn.Module):
    """Tables of the forward process, each float32 [1000], and the loss over them."""

    signal: torch.Tensor
    noise: torch.Tensor
    weight: torch.Tensor

    def __init__(self, model: nn.Module, min_snr: float) -> None:
        super().__init__()
        self.model = model
        betas = torch.linspace(BETA_START, BETA_END, TRAIN_TIMESTEPS, dtype=torch.float64)
        alphas = torch.cumprod(1 - betas, dim=0)
        ratio = alphas / (1 - alphas)
        self.register_buffer("signal", alphas.sqrt().float())
        self.register_buffer("noise", (1 - alphas).sqrt().float())
        self.register_buffer("weight", (ratio.clamp(max=min_snr) / ratio).float())

    def forward(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        timesteps: torch.Tensor,
        epsilon: torch.Tensor,
    ) -> torch.Tensor:
        """Scalar loss of uint8 images [N, 3, 32, 32], labels [N], timesteps [N] and epsilon.

        ``w(t) |eps_hat - eps|²`` with ``w = min(SNR, gamma) / SNR`` (Hang et al. 2023).
        """
        shape = (-1, 1, 1, 1)
        signal, noise = self.signal[timesteps].view(shape), self.noise[timesteps].view(shape)
        noisy = signal * to_unit_range(images) + noise * epsilon
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            predicted = self.model(
                noisy, timestep=timesteps, class_labels=labels, return_dict=False
            )[0]
        squares = (predicted.float() - epsilon).square().mean(dim=(1, 2, 3))
        return (self.weight[timesteps] * squares).mean()


def stratified_timesteps(count: int, generator: torch.Generator) -> torch.Tensor:
    """``count`` uniform timesteps, one from each of ``count`` equal slices: the loss varies less.

    Each timestep is as likely as under independent draws, so the gradient's mean is the same.
    """
    device = generator.device
    offset = torch.rand(count, device=device, generator=generator)
    position = (torch.arange(count, device=device) + offset) / count
    return (position * TRAIN_TIMESTEPS).long().clamp(max=TRAIN_TIMESTEPS - 1)
