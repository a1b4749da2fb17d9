"""AdamW for all parameters, or Muon for the blocks' linears and AdamW for the rest."""

from collections import defaultdict
from typing import Protocol

import torch
from torch import nn

Parameters = dict[str, nn.Parameter]


class Optimizer(Protocol):
    """What the trainer asks of an optimizer; its whole state is named tensors."""

    def step(self, rate: float) -> None:
        """Update the parameters from their gradients."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state, by name."""

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over a state that ``tensors`` returned."""


class AdamW:
    """``torch.optim.AdamW`` behind the ``Optimizer`` protocol, fused on a GPU."""

    SLOTS = ("step", "exp_avg", "exp_avg_sq")

    def __init__(self, parameters: Parameters, weight_decay: float) -> None:
        self.parameters = parameters
        self.inner = torch.optim.AdamW(
            parameters.values(),
            lr=0.0,
            betas=(0.9, 0.99),
            weight_decay=weight_decay,
            fused=next(iter(parameters.values())).is_cuda,
        )

    def step(self, rate: float) -> None:
        """One AdamW step with learning rate ``rate``."""
        self.inner.param_groups[0]["lr"] = rate
        self.inner.step()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Step count and both moments of each parameter."""
        state = self.inner.state
        return {
            f"adamw.{name}.{slot}": state[parameter][slot]
            for name, parameter in self.parameters.items()
            for slot in self.SLOTS
        }

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over a saved state."""
        for name, parameter in self.parameters.items():
            saved = {slot: tensors[f"adamw.{name}.{slot}"] for slot in self.SLOTS}
            self.inner.state[parameter] = {
                "step": saved["step"] if not parameter.is_cuda else saved["step"].cuda(),
                "exp_avg": saved["exp_avg"].to(parameter.device),
                "exp_avg_sq": saved["exp_avg_sq"].to(parameter.device),
            }


class Muon:
    """Momentum whose matrix is orthogonalised before each step (Jordan 2024).

    Updates are scaled to AdamW's usual root mean square of 0.2 (Liu et al. 2025, Moonlight), so
    both optimizers share a learning rate. Matrices of one shape (or its transpose) are stacked:
    a [R, C] with R > C joins its stack [n, C, R] transposed.
    """

    MOMENTUM = 0.95
    UPDATE_RMS = 0.2

    def __init__(self, parameters: Parameters, weight_decay: float) -> None:
        self.weight_decay = weight_decay
        self.stacks: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters.values():
            low, high = sorted(parameter.shape)
            self.stacks[low, high].append(parameter)
        self.momentum = {
            shape: torch.zeros(len(stack), *shape, device=stack[0].device)
            for shape, stack in self.stacks.items()
        }

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step with Nesterov momentum and decoupled weight decay."""
        for shape, stack in self.stacks.items():
            gradient = torch.stack([_wide(parameter.grad) for parameter in stack])
            momentum = self.momentum[shape].lerp_(gradient, 1 - self.MOMENTUM)
            direction = orthogonalise(gradient.lerp(momentum, self.MOMENTUM))
            scale = self.UPDATE_RMS * shape[1] ** 0.5
            updates = [
                update if parameter.shape == update.shape else update.T
                for parameter, update in zip(stack, direction, strict=True)
            ]
            torch._foreach_mul_(stack, 1 - rate * self.weight_decay)
            torch._foreach_add_(stack, updates, alpha=-rate * scale)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The momentum stacks."""
        return {f"muon.{low}x{high}": value for (low, high), value in self.momentum.items()}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over saved momentum stacks."""
        for (low, high), value in self.momentum.items():
            value.copy_(tensors[f"muon.{low}x{high}"])


class Both:
    """Several optimizers, each for its own parameters, with one learning rate."""

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts

    def step(self, rate: float) -> None:
        """Step every part."""
        for part in self.parts:
            part.step(rate)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The parts' states; their names do not meet."""
        return {name: value for part in self.parts for name, value in part.tensors().items()}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Hand every part the saved tensors."""
        for part in self.parts:
            part.load(tensors)


def orthogonalise(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Approximate ``U V^T`` of each matrix ``U S V^T`` in [n, R, C], R <= C, as float32.

    The quintic Newton-Schulz iteration ``X <- a X + (b A + c A²) X`` with ``A = X X^T``; its
    coefficients bring every singular value near 1 (0.7...1.2) in five iterations.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = x.bfloat16() if x.is_cuda else x
    for _ in range(iterations):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.float()


def build_optimizer(model: nn.Module, kind: str, weight_decay: float) -> Optimizer:
    """``adamw``, or ``muon`` for the blocks' attention and MLP weights with AdamW for the rest."""
    parameters = dict(model.named_parameters())
    if kind == "adamw":
        return AdamW(parameters, weight_decay)
    matrices = {name: value for name, value in parameters.items() if _is_block_linear(name)}
    rest = {name: value for name, value in parameters.items() if name not in matrices}
    return Both(Muon(matrices, weight_decay), AdamW(rest, weight_decay))


def _is_block_linear(name: str) -> bool:
    return name.endswith(".weight") and (".attn1." in name or ".ff." in name)


def _wide(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
