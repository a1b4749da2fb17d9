"""Linears wider than one product may add up: parts, and the accuracy that they are made for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from qdit.calibrate.quantizers import quantize_weight_nearest
from qdit.calibrate.schemes import LayerScheme
from qdit.calibrate.search.latency import LatencyKey
from qdit.calibrate.simulate import QuantizedLinear
from qdit.engines.onnxruntime_engine import OnnxRuntimeEngine
from qdit.engines.single_linears import linear_contents
from qdit.export.onnxruntime.linears import MOST_CHANNELS, block_parts
from qdit.export.single_linear import export_single_linear

SCHEMES = {
    "g128": LayerScheme(4, 8, 128, 128),
    "blocks smaller than the weight group": LayerScheme(4, 8, 288, 32),
    "asymmetric weights": LayerScheme(4, 8, 64, 64, weight_symmetric=False),
    "8 bits": LayerScheme(8, 8, 64, 64),
}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_wide_linear_keeps_the_bound_of_a_proof(scheme: LayerScheme, tmp_path: Path) -> None:
    case = LatencyKey("onnxruntime", 64, 4608, 96, scheme)
    generator = torch.Generator().manual_seed(0)
    weight = quantize_weight_nearest(torch.randn(96, 4608, generator=generator) * 0.05, scheme)
    bias = torch.randn(96, generator=generator)
    contents = replace(linear_contents(case), quantized=lambda: weight, bias=bias)
    path = tmp_path / "linear.onnx"
    export_single_linear(contents, path, rows=case.rows, target="onnxruntime")
    products = [n for n in onnx.load(path).graph.node if n.op_type == "MatMulNBits"]
    assert len(products) == 4608 // MOST_CHANNELS
    # GELU's output has a mean, which is what makes sums larger than their result
    x = torch.nn.functional.gelu(torch.randn(64, 4608, generator=generator))
    (made,) = OnnxRuntimeEngine(path, threads=1).infer({"x": x.numpy()}).values()
    wanted = QuantizedLinear(scheme, weight, bias)(x).detach().numpy()
    assert np.linalg.norm(made - wanted) <= 1e-6 * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    ("channels", "block", "parts"),
    [
        (1152, 128, [range(9)]),
        (MOST_CHANNELS, 128, [range(18)]),
        (4608, 128, [range(18), range(18, 36)]),
        (6912, 256, [range(9), range(9, 18), range(18, 27)]),
        (2560, 256, [range(5), range(5, 10)]),
        (2816, 256, [range(5), range(5, 11)]),
    ],
)
def test_parts_are_of_about_equal_size(channels: int, block: int, parts: list[range]) -> None:
    assert block_parts(channels, block) == parts
    assert max(len(part) for part in parts) * block <= MOST_CHANNELS
