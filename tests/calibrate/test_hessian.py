"""The Hessian and the factor of its inverse, against numpy-style float64 linear algebra."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
import torch

from qdit.calibrate.hessian import (
    HessianAccumulator,
    activation_order,
    exact_float32,
    inverse_factor,
)
from qdit.errors import StepError


class Recorder:
    def __init__(self) -> None:
        self.said: list[str] = []

    def track(self, items: Iterable, description: str, total: int | None = None) -> Iterator:
        yield from items

    def say(self, message: str) -> None:
        self.said.append(message)


def spread_hessian(k: int, rows: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x * torch.logspace(-2, 1, k, dtype=torch.float64)
    return 2 / rows * x.T @ x


def test_accumulated_batches_equal_the_whole() -> None:
    x = torch.randn(5, 7, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    accumulator = HessianAccumulator(48)
    accumulator.add(x[:2].float())
    accumulator.add(x[2:].float())
    flat = x.float().double().reshape(-1, 48)
    expected = 2 / 35 * flat.T @ flat
    assert accumulator.rows == 35
    torch.testing.assert_close(accumulator.hessian().double(), expected, rtol=1e-5, atol=1e-6)


def test_no_rows_is_an_error() -> None:
    with pytest.raises(StepError, match="at least one input row, got 0"):
        HessianAccumulator(4).hessian()


@pytest.mark.parametrize("rows", [16, 400], ids=["rank deficient", "full rank"])
def test_factor_is_the_normalized_cholesky_of_the_inverse(rows: int) -> None:
    hessian = spread_hessian(96, rows)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(96, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    expected = upper / upper.diagonal()[:, None]
    factor = inverse_factor(hessian)
    torch.testing.assert_close(factor.rows, expected, rtol=1e-8, atol=1e-10)
    assert factor.damping == 0.01
    # float32 statistics: the factor itself is exact, only H and the result are rounded
    single = inverse_factor(hessian.float()).rows
    assert single.dtype == torch.float32
    assert (single.double() - expected).norm() / expected.norm() < 1e-4


def test_importance_is_what_an_error_costs_after_all_others_made_up_for_it() -> None:
    # errors E at their turns make D = E·rows in the end; the rows make H diagonal, so D H Dᵀ is
    # the sum of the errors' squares, each times its importance
    hessian = spread_hessian(48, 200)
    order = activation_order(hessian)
    factor = inverse_factor(hessian, 0.01, order)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    costs = factor.rows @ damped[order][:, order] @ factor.rows.T
    expected = torch.diag(factor.importance[order])
    torch.testing.assert_close(costs, expected, rtol=1e-9, atol=1e-9 * costs.max().item())


def test_factor_in_another_order_is_that_of_the_reordered_hessian() -> None:
    hessian = spread_hessian(48, 200)
    order = activation_order(hessian)
    assert hessian.diagonal()[order].diff().max() <= 0
    factor = inverse_factor(hessian, 0.01, order)
    plain = inverse_factor(hessian[order][:, order], 0.01)
    torch.testing.assert_close(factor.rows, plain.rows, rtol=1e-12, atol=1e-12)
    assert torch.equal(factor.order, order)


def test_indefinite_hessian_raises_the_damping_and_says_so() -> None:
    hessian = torch.eye(8) - 0.5 * torch.ones(8, 8)  # smallest eigenvalue −3, mean diagonal 0.5
    recorder = Recorder()
    factor = inverse_factor(hessian, name="blocks.0.fc", progress=recorder)
    assert factor.damping == pytest.approx(10.0)
    assert len(recorder.said) == 3
    assert "blocks.0.fc is not positive definite at damping 0.01; trying 0.1" in recorder.said[0]


def test_hopeless_hessian_is_an_error() -> None:
    with pytest.raises(StepError, match="does not factor even at damping"):
        inverse_factor(torch.full((4, 4), -1.0))


def test_overflowed_hessian_is_an_error() -> None:
    hessian = torch.eye(4)
    hessian[1, 2] = torch.inf
    with pytest.raises(StepError, match=r"Hessian of blocks\.3\.out must be finite"):
        inverse_factor(hessian, name="blocks.3.out")


def test_dead_inputs_are_marked() -> None:
    hessian = torch.diag(torch.tensor([1.0, 0.0, 4.0]))
    factor = inverse_factor(hessian)
    assert factor.dead.tolist() == [False, True, False]
    ordered = inverse_factor(hessian, order=activation_order(hessian))
    assert ordered.dead.tolist() == [False, False, True], "by position"
    assert torch.equal(factor.rows, torch.eye(3))


def test_exact_float32_puts_the_setting_back() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with exact_float32():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
