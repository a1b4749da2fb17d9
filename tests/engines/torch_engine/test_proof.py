"""The proof of the torch engine, on a CPU through the kernels' meaning in torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qdit.calibrate.sampling import SamplingSettings
from qdit.calibrate.schemes import LayerScheme
from qdit.engines.gate import Limits, judge
from qdit.engines.options import ValidateOptions
from qdit.engines.parity import DenoiserParity, measure_parity
from qdit.engines.parity_inputs import record_trajectories
from qdit.engines.proof_engine import TorchProof
from qdit.engines.torch_engine.engine import TorchEngine
from qdit.engines.torch_engine.exposed import exposed_values_of
from qdit.engines.validate_job import run_validate
from qdit.errors import InputError
from qdit.progress import Silent

DOWN = "transformer_blocks.1.ff.net.2"
SCHEMES = {
    "w4a8": LayerScheme(4, 8, 32, 64),
    "asymmetric": LayerScheme(4, 8, 32, 64, False, False),
    "integer scales": LayerScheme(4, 8, 32, "token", scale_format="integer"),
    "weight-only": LayerScheme(4, 16, 64),
}


@pytest.fixture(autouse=True)
def few_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qdit.engines.parity._FEWEST_ACTIVATIONS", 2e5)


def measured(made: Any, checkpoint: Any = None) -> DenoiserParity:
    steps = record_trajectories(made.model, SamplingSettings(3, 1.0, 0), 2)
    engine = TorchProof(checkpoint or made.checkpoint, "cpu")
    return measure_parity(made.model, made.checkpoint, engine, steps)


def outcomes(parity: DenoiserParity) -> dict[str, Any]:
    return {check.name: check for check in judge(parity, None, None, Limits()).checks}


@pytest.mark.parametrize("name", SCHEMES)
def test_the_engine_is_within_every_bound(name: str, make_quantized: Callable[..., Any]) -> None:
    made = make_quantized(SCHEMES[name])
    parity = measured(made)
    found = outcomes(parity)
    for check in ("linears_same_input", "denoiser_bound"):
        assert found[check].outcome == "passed", found[check].why
    assert parity.dtype == "float16"
    assert len(parity.linears) == len(made.model.linears)
    # a product rounds to float16 once
    assert all(linear.comparison.relative_error < 2**-11 for linear in parity.linears)
    assert [block.engine is not None for block in parity.blocks] == [True, True]


def test_a_wrong_scale_is_found_in_its_linear(make_quantized: Callable[..., Any]) -> None:
    made = make_quantized(SCHEMES["w4a8"])
    wrong = make_quantized(SCHEMES["w4a8"])
    weights = dict(wrong.weights)
    scale = weights[DOWN].scale.clone()
    scale[0] *= 2
    weights[DOWN] = replace(weights[DOWN], scale=scale)
    other = type(made.checkpoint).from_result(made.model, made.plan, weights, {}, {})
    parity = measured(made, other)
    assert parity.worst_linear is not None
    assert parity.worst_linear.name == DOWN
    assert outcomes(parity)["linears_same_input"].outcome == "failed"


def test_inner_values_are_those_of_the_gated_products_without_the_gate(
    make_quantized: Callable[..., Any],
) -> None:
    made = make_quantized(SCHEMES["w4a8"])
    values = exposed_values_of(made.checkpoint)
    engine = TorchEngine(made.checkpoint, device="cpu", extra_outputs=values.names)
    random = torch.Generator().manual_seed(0)
    tensors = made.model.family.example_inputs(made.model.denoiser, 2, random)
    names = [spec.name for spec in engine.input_specs]
    arrays = engine.infer({n: v.numpy() for n, v in zip(names, tensors, strict=True)})
    assert set(arrays) == {"sample", *values.names}
    plain = TorchEngine(made.checkpoint, device="cpu").run(*tensors).float().numpy()
    assert np.array_equal(arrays["sample"], plain)
    weight = made.weights[DOWN].dequantize(torch.float64)
    bias = made.model.denoiser.get_submodule(DOWN).bias.double()
    expected = torch.from_numpy(arrays[f"{DOWN}.input"]).double() @ weight.t() + bias
    output = torch.from_numpy(arrays[f"{DOWN}.output"]).double()
    assert (output - expected).norm() / expected.norm() < 2**-11


def test_an_inner_value_that_is_not_there_is_named(make_quantized: Callable[..., Any]) -> None:
    made = make_quantized(SCHEMES["w4a8"])
    engine = TorchEngine(made.checkpoint, device="cpu", extra_outputs=["nothing.output"])
    tensors = made.model.family.example_inputs(made.model.denoiser, 1, torch.Generator())
    names = [spec.name for spec in engine.input_specs]
    with pytest.raises(InputError, match=r"no inner value 'nothing\.output'"):
        engine.infer({n: v.numpy() for n, v in zip(names, tensors, strict=True)})


def test_the_proof_needs_a_gpu(tmp_path: Path, make_quantized: Callable[..., Any]) -> None:
    make_quantized(SCHEMES["w4a8"]).checkpoint.write(tmp_path)
    options = ValidateOptions(engine="torch", device="cpu")
    with pytest.raises(InputError, match="--engine torch runs CUDA kernels, got --device cpu"):
        run_validate(tmp_path, options, None, "", Silent())
