"""GPTQ on a GPU: replayed graphs equal the eager loop to the bit, and the CPU in quality."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qdit.calibrate.blockwise import quantize_model
from qdit.calibrate.calibration_set import CalibrationSet
from qdit.calibrate.column_loop import ColumnLoop, LoopShape
from qdit.calibrate.gptq import Order, gptq
from qdit.calibrate.model import DiffusionModel
from qdit.calibrate.plan import uniform_plan
from qdit.calibrate.schemes import LayerScheme

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def fill(loop: ColumnLoop, seed: int) -> None:
    generator = torch.Generator("cuda").manual_seed(seed)
    width, rows = loop.columns.shape
    loop.columns.copy_(torch.randn(width, rows, device="cuda", generator=generator))
    noise = torch.randn(width, width, device="cuda", generator=generator)
    loop.factor.copy_(torch.eye(width, device="cuda") + 0.1 * noise.triu(1))
    loop.scale.fill_(0.3)
    loop.zero_point.fill_(0.0 if loop.shape.scheme.weight_symmetric else 7.0)
    loop.channel.copy_(0.02 + 0.04 * torch.rand(1, rows, device="cuda", generator=generator))
    loop.importance.copy_(torch.rand(width, device="cuda", generator=generator))


@pytest.mark.parametrize("group", [32, 128, None], ids=["g32", "g128", "given"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"weight_symmetric": False}, {"scale_format": "integer"}],
    ids=["symmetric", "asymmetric", "integer scales"],
)
@pytest.mark.parametrize("clipped", [True, False], ids=["clipped", "full range"])
def test_a_replayed_loop_equals_the_eager_one(
    group: int | None, fields: dict, clipped: bool
) -> None:
    scheme = LayerScheme(4, 16, 32, **fields)
    with torch.no_grad():
        loop = ColumnLoop(LoopShape(128, 96, group, scheme, clipped), torch.ones(1, device="cuda"))
        for seed in (0, 1):  # twice: a replay must read the new inputs
            fill(loop, seed)
            loop.run()
            outputs = (loop.values, loop.errors, loop.scale, loop.zero_point)
            replayed = [tensor.clone() for tensor in outputs]
            fill(loop, seed)
            loop.run_eagerly()
            for one, other in zip(replayed, outputs, strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("order", ["activation", "natural"])
@pytest.mark.parametrize("group", [96, 128, 288], ids=str)
@pytest.mark.parametrize(
    "fields",
    [{"weight_symmetric": False}, {"scale_format": "integer"}],
    ids=["float scales", "integer scales"],
)
def test_equals_the_cpu_in_quality(fields: dict, group: int, order: Order) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 1152, generator=generator)
    x = x @ torch.randn(1152, 1152, generator=generator) / 34
    weight = torch.randn(256, 1152, generator=generator) / 34
    hessian = 2 / len(x) * x.T @ x
    scheme = LayerScheme(4, 16, group, **fields)
    cpu = gptq(weight, hessian, scheme, order=order)
    cuda = gptq(weight.cuda(), hessian.cuda(), scheme, order=order).to("cpu")
    errors = [(x @ (weight - q.dequantize()).T).norm().item() for q in (cpu, cuda)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)
    assert (cpu.values == cuda.values).double().mean() > 0.98


def test_a_model_equals_the_cpu_in_quality(make_model: Callable[..., DiffusionModel]) -> None:
    errors = []
    for device in ("cpu", "cuda"):
        model = make_model()
        plan = uniform_plan("w4a8", LayerScheme(4, 8, 32, 32), model.linears)
        inputs = model.family.example_inputs(model.denoiser, 48, torch.Generator().manual_seed(0))
        result = quantize_model(model, plan, "gptq", CalibrationSet(*inputs), device=device)
        assert all(not weight.values.is_cuda for weight in result.weights.values())
        errors.append(result.errors)
    for name, error in errors[0].items():
        assert error.output == pytest.approx(errors[1][name].output, rel=0.05), name
