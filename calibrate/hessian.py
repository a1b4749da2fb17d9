"""GPTQ's second-order statistics: the Hessian of a linear's squared output error, and its factor.

For y = W x the error E‖(W−Ŵ)x‖² is quadratic in each row of W with Hessian H = 2·E[x xᵀ]
(GPTQ, arXiv 2210.17323, section 3), so all rows of all linears that read x share one H.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import StepError
from ..progress import Progress, Silent

# Each failed factorization is tried again with the damping raised by this factor, so often.
DAMPING_STEP = 10.0
DAMPING_TRIES = 5
_SILENT = Silent()


@contextmanager
def exact_float32() -> Iterator[None]:
    """Float32 products at full precision inside (no TF32), whatever the process has set.

    A Hessian summed from TF32 products (10-bit mantissa) is off by 1e-3 of its largest
    eigenvalue; the damped smallest one is of that size, so the solution would change.
    """
    matmul = torch.get_float32_matmul_precision()
    convolution = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution


class HessianAccumulator:
    """Sums H = (2/n) Σ x xᵀ over n input rows x [K], in float32, on `device`."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(in_features, in_features, device=device)
        self.rows = 0

    def add(self, inputs: Tensor) -> None:
        """Add the rows of `inputs` [..., K]."""
        flat = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self._sum.addmm_(flat.t(), flat)
        self.rows += flat.shape[0]

    def hessian(self) -> Tensor:
        """H [K, K]. Raises `StepError` when no input has been seen."""
        if self.rows == 0:
            raise StepError("a Hessian needs at least one input row, got 0; run calibration first")
        return self._sum * (2.0 / self.rows)


@dataclass(frozen=True)
class InverseFactor:
    """H⁻¹ as GPTQ uses it: with H⁻¹ = Uᵀ U (U upper), `rows` is U with each row divided by U[i, i].

    order: int64 [K], the input of each position: rows and columns of H were put in this order.
    rows: [K, K] in H's dtype, unit upper triangular: an error e at position i moves position j by
    −e·rows[i, j]. dead: bool [K] by position, the inputs that never were non-zero. damping: the
    share of the mean diagonal that was added in the end. importance: [K] by input, 1 / U[i, i]² of
    its position i: what a squared error of its weight costs once the weights behind it have made
    up for it as well as they can. The error of all, e H eᵀ of the damped H, is the sum of these.
    """

    rows: Tensor
    order: Tensor
    dead: Tensor
    damping: float
    importance: Tensor


def activation_order(hessian: Tensor) -> Tensor:
    """Inputs by falling mean square, int64 [K]; equal ones in their natural order."""
    return torch.argsort(hessian.diagonal(), descending=True, stable=True)


def inverse_factor(
    hessian: Tensor,
    damping: float = 0.01,
    order: Tensor | None = None,
    *,
    name: str = "a linear",
    progress: Progress = _SILENT,
) -> InverseFactor:
    """Factor the damped inverse of `hessian` [K, K], its inputs taken in `order` (natural if None).

    Dead inputs get H = 1 on the diagonal; then `damping` × mean diagonal is added to it. If the
    Cholesky factorization fails, the damping is raised tenfold and `progress` told, up to
    `DAMPING_TRIES` times. Raises `StepError` when H is not finite or never factors.

    Instead of Cholesky → inverse → Cholesky this factors H = R Rᵀ with R upper (the Cholesky of
    H with rows and columns reversed), so that U = R⁻¹: half the work, and no second factorization
    that rounding can break. It runs in float64: the condition number reaches K / damping.
    """
    if not torch.isfinite(hessian).all():
        raise StepError(
            f"the Hessian of {name} must be finite, got NaN or infinity; the calibration inputs "
            "overflow: check the model's outputs in full precision"
        )
    if order is None:
        order = torch.arange(hessian.shape[0], device=hessian.device)
    wide = hessian[order][:, order].double()
    dead = wide.diagonal() == 0
    wide.diagonal().add_(dead)
    mean = wide.diagonal().mean()
    share = damping
    for _ in range(DAMPING_TRIES):
        damped = wide.clone()
        damped.diagonal().add_(share * mean)
        reversed_lower, failure = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failure.item():
            rows = _unit_inverse(reversed_lower).to(hessian.dtype)
            importance = torch.empty_like(hessian[0])
            importance[order] = reversed_lower.diagonal().flip(0).square().to(hessian.dtype)
            return InverseFactor(rows, order, dead, share, importance)
        raised = max(share, 1e-4) * DAMPING_STEP
        progress.say(
            f"the Hessian of {name} is not positive definite at damping {share:g}; "
            f"trying {raised:g}"
        )
        share = raised
    raise StepError(
        f"the Hessian of {name} does not factor even at damping {share / DAMPING_STEP:g}; "
        "use more calibration samples or --weights mse"
    )


def _unit_inverse(reversed_lower: Tensor) -> Tensor:
    """From the Cholesky factor of the reversed H: (R · diag(R)⁻¹)⁻¹."""
    upper = reversed_lower.flip(0, 1)
    unit = upper / upper.diagonal()
    identity = torch.eye(unit.shape[0], dtype=unit.dtype, device=unit.device)
    return torch.linalg.solve_triangular(unit, identity, upper=True, unitriangular=True)
