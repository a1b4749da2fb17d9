"""Training batches drawn on the device: epochs without replacement, flips and label dropout."""

from typing import NamedTuple

import torch

from demo_recipe.diffusion import stratified_timesteps
from demo_recipe.dit import NULL_LABEL
from demo_recipe.errors import RecipeError
from demo_recipe.images import ImageSet


class Batch(NamedTuple):
    """Images uint8 [N, 3, 32, 32], labels and timesteps int64 [N], epsilon float32 like images."""

    images: torch.Tensor
    labels: torch.Tensor
    timesteps: torch.Tensor
    epsilon: torch.Tensor


class BatchSource:
    """Batches of ``train``; the state is ``generator`` and the step, nothing else."""

    def __init__(self, train: ImageSet, batch_size: int, label_dropout: float, seed: int) -> None:
        if not 1 <= batch_size <= len(train):
            raise RecipeError(
                f"the batch size must lie between 1 and the {len(train)} training images, "
                f"got {batch_size}; pass a smaller --batch-size"
            )
        self.train = train
        self.batch_size = batch_size
        self.label_dropout = label_dropout
        self.seed = seed
        self.device = train.images.device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.epoch = -1
        self.order = torch.empty(0)

    def draw(self, step: int) -> Batch:
        """The batch of ``step`` (from 0); to be called once a step, in order."""
        index = self._index(step)
        images, labels = self.train.images[index], self.train.labels[index]
        flip, drop = torch.rand(2, len(index), device=self.device, generator=self.generator)
        images = torch.where((flip < 0.5)[:, None, None, None], images.flip(-1), images)
        labels = torch.where(drop < self.label_dropout, NULL_LABEL, labels)
        timesteps = stratified_timesteps(len(index), self.generator)
        epsilon = torch.randn(images.shape, device=self.device, generator=self.generator)
        return Batch(images, labels, timesteps, epsilon)

    def _index(self, step: int) -> torch.Tensor:
        """Image numbers [batch_size]; an epoch's order depends on the seed and the epoch alone."""
        epoch, position = divmod(step, len(self.train) // self.batch_size)
        if epoch != self.epoch:
            source = torch.Generator(self.device).manual_seed((self.seed << 20) + epoch + 1)
            self.order = torch.randperm(len(self.train), device=self.device, generator=source)
            self.epoch = epoch
        return self.order[position * self.batch_size : (position + 1) * self.batch_size]
