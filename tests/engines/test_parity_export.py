"""Parity of real exports in ONNX Runtime: the bounds hold, and a wrong file breaks them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import onnx
import pytest
import torch
from onnx import numpy_helper

from qdit.calibrate.checkpoint import QuantizedCheckpoint
from qdit.calibrate.families.dit import FAMILY
from qdit.calibrate.model import DiffusionModel, ModelSource
from qdit.calibrate.plan import uniform_plan
from qdit.calibrate.quantizers import quantize_weight_nearest
from qdit.calibrate.sampling import SamplingSettings
from qdit.calibrate.schemes import LayerScheme
from qdit.engines.gate import Check, Limits, judge
from qdit.engines.parity import DenoiserParity, measure_parity
from qdit.engines.parity_inputs import record_trajectories
from qdit.engines.proof_engine import OnnxRuntimeProof
from qdit.export.qdq import export_qdq

CONFIG = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "in_channels": 3,
    "out_channels": 3,
    "num_layers": 2,
    "sample_size": 16,
    "patch_size": 2,
    "num_embeds_ada_norm": 4,
    "norm_num_groups": 32,
}
SCHEDULER = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000}
Dtype = Literal["float32", "float16"]


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    torch.manual_seed(0)
    denoiser = FAMILY.build(CONFIG)
    for parameter in denoiser.parameters():  # adaLN-zero would switch every block off
        parameter.copy_(torch.randn_like(parameter) * 0.1)
    FAMILY.tie_shared_modules(denoiser)
    source = ModelSource("random", "random:tiny", "")
    return DiffusionModel("tiny", source, FAMILY, denoiser, CONFIG, SCHEDULER)


def exported(
    model: DiffusionModel, folder: Path, scheme: LayerScheme, dtype: Dtype
) -> tuple[QuantizedCheckpoint, Path]:
    plan = uniform_plan("w4a8", scheme, model.linears)
    weights = {
        spec.name: quantize_weight_nearest(
            model.denoiser.get_submodule(spec.name).weight, plan[spec.name]
        )
        for spec in model.linears
        if plan[spec.name].quantizes_weights
    }
    checkpoint = QuantizedCheckpoint.from_result(model, plan, weights, {}, {})
    export_qdq(checkpoint, folder / "model.onnx", dtype=dtype)
    return checkpoint, folder / "model.onnx"


def measured(
    model: DiffusionModel, checkpoint: QuantizedCheckpoint, path: Path, dtype: Dtype
) -> DenoiserParity:
    steps = record_trajectories(model, SamplingSettings(4, 1.0, 0), 2)
    return measure_parity(model, checkpoint, OnnxRuntimeProof(path, dtype), steps)


def checks(parity: DenoiserParity) -> dict[str, Check]:
    return {check.name: check for check in judge(parity, None, None, Limits()).checks}


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        (LayerScheme(4, 8, 64, 64), "float32"),
        (LayerScheme(8, 8, "channel", "token", False, False), "float32"),
        (LayerScheme(4, 16, 64), "float32"),
        (LayerScheme(4, 8, 64, 64), "float16"),
    ],
    ids=["w4a8-g64", "w8a8-token-asym", "w4a16", "w4a8-g64-float16"],
)
def test_real_exports_are_within_every_bound(
    model: DiffusionModel, tmp_path: Path, scheme: LayerScheme, dtype: Dtype
) -> None:
    parity = measured(model, *exported(model, tmp_path, scheme, dtype), dtype)
    found = checks(parity)
    for name in ("linears_same_input", "denoiser_bound", "simulation_error"):
        assert found[name].outcome == "passed", found[name].why
    assert len(parity.linears) == len(model.linears)
    assert len(parity.blocks) == 2 and all(block.engine for block in parity.blocks)


def test_a_file_with_one_wrong_scale_breaks_the_bounds(
    model: DiffusionModel, tmp_path: Path
) -> None:
    checkpoint, path = exported(model, tmp_path, LayerScheme(4, 8, 64, 64), "float32")
    wrong = onnx.load(path)
    name = "transformer_blocks.1.ff.net.2"
    scale = next(
        value
        for value in wrong.graph.initializer
        if value.name.startswith(name) and "scale" in value.name
    )
    values = numpy_helper.to_array(scale).copy()
    values.flat[0] *= 1.5
    scale.CopyFrom(numpy_helper.from_array(values, scale.name))
    onnx.save(wrong, path)
    parity = measured(model, checkpoint, path, "float32")
    found = checks(parity)
    assert found["linears_same_input"].outcome == "failed"
    assert name in found["linears_same_input"].why
    assert found["denoiser_bound"].outcome == "failed"
    assert parity.worst_linear is not None and parity.worst_linear.name == name
