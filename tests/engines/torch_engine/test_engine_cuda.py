"""The torch engine on a GPU: graphs, and the kernels against their meaning on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qdit.calibrate.sampling import SamplingSettings
from qdit.calibrate.schemes import LayerScheme
from qdit.engines.gate import Limits, judge
from qdit.engines.parity import measure_parity
from qdit.engines.parity_inputs import record_trajectories
from qdit.engines.proof_engine import TorchProof
from qdit.engines.torch_engine.engine import TorchEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ADALN = {f"transformer_blocks.{i}.norm1.linear": LayerScheme(4, 16, 64) for i in range(2)}
SCHEMES = {
    "w4a8": LayerScheme(4, 8, 32, 64),
    "w8a8": LayerScheme(8, 8, 64, 64),
    "asymmetric": LayerScheme(4, 8, 32, 64, False, False),
    "integer scales": LayerScheme(4, 8, 64, "token", scale_format="integer"),
    "16/16": LayerScheme(16, 16),
}


def inputs_of(made: Any, batch: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(batch)
    return list(made.model.family.example_inputs(made.model.denoiser, batch, random))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_is_what_the_reference_computes(
    name: str, dtype: Any, make_quantized: Callable[..., Any]
) -> None:
    layers = {} if name == "16/16" else ADALN
    made = make_quantized(SCHEMES[name], layers, attention_head_dim=64)
    on_cpu = TorchEngine(made.checkpoint, device="cpu", dtype=dtype)
    on_gpu = TorchEngine(made.checkpoint, dtype=dtype)
    assert on_gpu.weight_bytes == on_cpu.weight_bytes
    for batch in (3, 1, 3):
        inputs = inputs_of(made, batch)
        expected = on_cpu.run(*inputs).float()
        output = on_gpu.run(*(value.cuda() for value in inputs)).float().cpu()
        distance = (output - expected).norm() / expected.norm()
        assert distance < {"float16": 4e-3, "bfloat16": 3e-2}[dtype]


def test_a_replayed_graph_is_the_eager_forward_to_the_bit(
    make_quantized: Callable[..., Any],
) -> None:
    made = make_quantized(SCHEMES["w4a8"], ADALN, attention_head_dim=64)
    eager = TorchEngine(made.checkpoint, graphs=False)
    graphed = TorchEngine(made.checkpoint)
    for batch in (2, 5, 2):
        inputs = [value.cuda() for value in inputs_of(made, batch)]
        assert torch.equal(graphed.run(*inputs), eager.run(*inputs))


@pytest.mark.parametrize("name", ["w4a8", "asymmetric", "integer scales"])
def test_the_proof_holds(
    name: str, make_quantized: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qdit.engines.parity._FEWEST_ACTIVATIONS", 1e6)
    made = make_quantized(SCHEMES[name], ADALN, attention_head_dim=64)
    made.model.denoiser.to("cuda")
    steps = record_trajectories(made.model, SamplingSettings(4, 1.0, 0), 2)
    engine = TorchProof(made.checkpoint, "cuda")
    parity = measure_parity(made.model, made.checkpoint, engine, steps)
    checks = {check.name: check for check in judge(parity, None, None, Limits()).checks}
    for check in ("linears_same_input", "denoiser_bound"):
        assert checks[check].outcome == "passed", checks[check].why
