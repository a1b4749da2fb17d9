"""Linears of a small DiT as the search sees them, and a tiny search with all that it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from qdit.calibrate.frechet import Statistics, statistics
from qdit.calibrate.model import DiffusionModel
from qdit.calibrate.plan import LinearSpec, QuantizationPlan, Role
from qdit.calibrate.sampling import SamplingSettings
from qdit.calibrate.schemes import LayerScheme
from qdit.calibrate.search.fitness import FitnessSettings
from qdit.calibrate.search.payload import EvaluatorPayload, make_payload
from qdit.calibrate.search.space import SearchSpace, search_space
from qdit.calibrate.search.weight_cache import WeightCache, build_weight_cache
from qdit.calibrate.trajectories import CalibrationSet

_LAYERS: tuple[tuple[str, Role, int, int, str], ...] = (
    ("norm1.linear", "adaln", 1, 6, "norm1.linear"),
    ("attn1.to_q", "attention_qkv", 1, 1, "attn1"),
    ("attn1.to_k", "attention_qkv", 1, 1, "attn1"),
    ("attn1.to_v", "attention_qkv", 1, 1, "attn1"),
    ("attn1.to_out.0", "attention_out", 1, 1, "attn1.to_out.0"),
    ("ff.net.0.proj", "mlp_in", 1, 4, "ff.net.0.proj"),
    ("ff.net.2", "mlp_out", 4, 1, "ff.net.2"),
)


def dit_linears(width: int, blocks: int = 1) -> list[LinearSpec]:
    """The linears of a DiT of this hidden size, as `DiTFamily.linears` names them."""
    return [
        LinearSpec(
            name=f"transformer_blocks.{block}.{path}",
            role=role,
            block=block,
            in_features=k * width,
            out_features=n * width,
            has_bias=True,
            input_name=f"transformer_blocks.{block}.{source}.input",
        )
        for block in range(blocks)
        for path, role, k, n, source in _LAYERS
    ]


@pytest.fixture(scope="session")
def linears() -> list[LinearSpec]:
    """Two blocks of hidden size 192."""
    return dit_linears(192, blocks=2)


@dataclass
class TinySearch:
    """A random DiT of two blocks, the space of its w4a8 plans, and what judges a plan of it."""

    model: DiffusionModel
    space: SearchSpace
    cache: WeightCache
    reference: Statistics
    features: Path
    payload: EvaluatorPayload

    def plans(self, count: int) -> list[QuantizationPlan]:
        """Different plans of the space, always the same ones."""
        sizes = self.space.sizes
        return [
            self.space.plan([(3 * gene + plan) % size for gene, size in enumerate(sizes)])
            for plan in range(count)
        ]


@pytest.fixture(scope="session")
def tiny(
    make_model: Callable[..., DiffusionModel], tmp_path_factory: pytest.TempPathFactory
) -> TinySearch:
    """Six images of 8×8 in two steps a candidate: some 50 ms."""
    model = make_model()
    # diffusers' zero-initialized output layers would make every image independent of the linears;
    # no two parameters are alike, or a mix-up of linears or blocks would pass unseen
    random = torch.Generator().manual_seed(0)
    for parameter in model.denoiser.parameters():
        parameter.data.normal_(std=0.1, generator=random)
    space = search_space(model.linears, LayerScheme(), "w4a8")
    cache = build_weight_cache(model, space, "nearest", None)
    features = quadrant_means(tmp_path_factory.mktemp("features") / "quadrants.onnx")
    rows = np.random.default_rng(0).normal(size=(64, 12))
    reference = statistics(rows)
    settings = FitnessSettings(SamplingSettings(2, 1.0, 7), samples=6, batch_size=4)
    payload = make_payload(
        model, cache, settings, features=features, reference=reference, threads=1
    )
    return TinySearch(model, space, cache, reference, features, payload)


@pytest.fixture(scope="session")
def calibration(tiny: TinySearch) -> CalibrationSet:
    """Twelve random inputs."""
    family, denoiser = tiny.model.family, tiny.model.denoiser
    return CalibrationSet(*family.example_inputs(denoiser, 12, torch.Generator().manual_seed(1)))


@pytest.fixture(scope="session")
def gptq_cache(tiny: TinySearch, calibration: CalibrationSet) -> WeightCache:
    return build_weight_cache(tiny.model, tiny.space, "gptq", calibration)


def quadrant_means(path: Path) -> Path:
    """A feature network: the mean of each channel in each quadrant of 8×8 images, [n, 12]."""
    nodes = [
        helper.make_node("AveragePool", ["images"], ["means"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Flatten", ["means"], ["features"]),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 8, 8])
    output = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 12])
    graph = helper.make_graph(nodes, "quadrants", [images], [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)
    return path
