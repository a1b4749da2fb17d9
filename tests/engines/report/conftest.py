"""One small report, assembled from a real checkpoint and figures made up for it."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch

from qdit.calibrate.checkpoint import QuantizedCheckpoint
from qdit.calibrate.families.dit import FAMILY
from qdit.calibrate.fid import FidDifference
from qdit.calibrate.model import DiffusionModel, ModelSource
from qdit.calibrate.plan import QuantizationPlan, uniform_plan
from qdit.calibrate.quantizers import quantize_weight_nearest
from qdit.calibrate.sampling import SamplingSettings
from qdit.calibrate.schemes import LayerScheme
from qdit.engines.gate import Limits, judge
from qdit.engines.parity import DenoiserParity
from qdit.engines.parity_images import image_parity
from qdit.engines.parity_internals import BlockError, LinearError
from qdit.engines.parity_measure import Comparison, Worst
from qdit.engines.parity_timesteps import DenoiserBound, TimestepError
from qdit.engines.report.build import Proof, build_report
from qdit.engines.report.schema import Report

CONFIG = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 3,
    "out_channels": 3,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 4,
    "norm_num_groups": 32,
}


def apart(relative: float) -> Comparison:
    return Comparison(relative * 10, 10.0, 100, Worst((0, 1, 2), 1.0, 1.0 + relative, relative))


@pytest.fixture(scope="session")
def model() -> DiffusionModel:
    torch.manual_seed(0)
    denoiser = FAMILY.build(CONFIG)
    FAMILY.tie_shared_modules(denoiser)
    source = ModelSource("random", "random:tiny", "", 0)
    return DiffusionModel("tiny-dit", source, FAMILY, denoiser, CONFIG, {})


@pytest.fixture(scope="session")
def checkpoint(model: DiffusionModel) -> QuantizedCheckpoint:
    plan = uniform_plan("w4a8", LayerScheme(4, 8, 32, 32), model.linears)
    weights = {
        spec.name: quantize_weight_nearest(
            model.denoiser.get_submodule(spec.name).weight, plan[spec.name]
        )
        for spec in model.linears
    }
    metrics = {spec.name: {"weight": 0.08, "output": 0.02} for spec in model.linears}
    return QuantizedCheckpoint.from_result(model, plan, weights, {"weights": "nearest"}, metrics)


@pytest.fixture(scope="session")
def integer_checkpoint(model: DiffusionModel) -> QuantizedCheckpoint:
    """Integer scales in all linears but the adaLN ones."""
    plan = uniform_plan("w4a8", LayerScheme(4, 8, 32, "token"), model.linears)
    layers = {
        spec.name: replace(plan[spec.name], scale_format="integer")
        if spec.role != "adaln"
        else plan[spec.name]
        for spec in model.linears
    }
    plan = QuantizationPlan("w4a8", layers)
    weights = {
        spec.name: quantize_weight_nearest(
            model.denoiser.get_submodule(spec.name).weight, plan[spec.name]
        )
        for spec in model.linears
    }
    metrics: dict[str, dict[str, Any]] = {}
    for number, spec in enumerate(model.linears):
        metrics[spec.name] = {"weight": 0.08, "output": 0.02 + 0.001 * number}
        if plan[spec.name].has_integer_scales:
            metrics[spec.name]["float_scales"] = {"weight": 0.1, "output": 0.025}
    return QuantizedCheckpoint.from_result(model, plan, weights, {"weights": "gptq"}, metrics)


@pytest.fixture(scope="session")
def proof(model: DiffusionModel) -> Proof:
    parity = DenoiserParity(
        simulation=apart(0.05),
        engine=apart(0.004),
        bound=DenoiserBound(apart(0.004), apart(0.005), ("float32", "float64"), 8),
        linears=[
            LinearError(spec.name, spec.role, spec.block, apart(2e-7)) for spec in model.linears
        ],
        blocks=[BlockError(block, apart(0.01), apart(0.001)) for block in range(2)],
        timesteps=[
            TimestepError(i, timestep, apart(0.03), apart(0.002))
            for i, timestep in enumerate((750, 500, 250, 0))
        ],
        images=2,
        dtype="float32",
    )
    fid = FidDifference(5.0, 5.1, 0.1, (-0.2, 0.4), 64, 8, 1000, 1000, 0.01, "paired bootstrap")
    images, limits = image_parity([0.0004, 0.04]), Limits()
    gate = judge(parity, images, fid, limits)
    return Proof(parity, images, fid, limits, gate, "onnxruntime", "features.onnx", "ref.npz")


@pytest.fixture(scope="session")
def report(
    model: DiffusionModel,
    checkpoint: QuantizedCheckpoint,
    proof: Proof,
    tmp_path_factory: pytest.TempPathFactory,
) -> Report:
    output: Path = tmp_path_factory.mktemp("export")
    (output / "model.onnx").write_bytes(b"abc")
    return build_report(
        model,
        checkpoint,
        proof,
        SamplingSettings(4, 1.5, 7),
        command="qdit-export --bits w4a8 --group-size 32",
        timings={"quantize": 61.5, "onnx": 2.25},
        machine={"summary": "a test", "python": "3.11", "versions": {"torch": "2.13"}},
        output=output,
        files=[output / "model.onnx"],
        warnings=["this machine was busy"],
        created=datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc),
    )
