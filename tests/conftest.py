"""Fixtures that every folder of tests may use."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from qdit.calibrate.checkpoint import QuantizedCheckpoint
from qdit.calibrate.families import family_named
from qdit.calibrate.model import DiffusionModel, ModelSource
from qdit.calibrate.plan import QuantizationPlan, uniform_plan
from qdit.calibrate.quantizers import QuantizedWeight, quantize_weight_nearest
from qdit.calibrate.schemes import LayerScheme

_ROOT = Path(__file__).resolve().parent.parent
_NOT_SOURCE = (
    "*.egg-info",
    "__pycache__",
    "build",
    "dist",
    "tests",
    "recipes",
    "docs",
    "benchmarks",
)


CONFIG: dict[str, Any] = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 3,
    "out_channels": 6,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 5,
    "timestep_downscale_freq_shift": 1,
}


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return _ROOT


@pytest.fixture(scope="session")
def copy_source() -> Callable[[Path], Path]:
    """A function that copies the package's source, and no build output, into a new folder."""

    def copy(target: Path) -> Path:
        ignore = shutil.ignore_patterns(".*", *_NOT_SOURCE)
        shutil.copytree(_ROOT, target, ignore=ignore)
        return target

    return copy


@pytest.fixture(scope="session")
def make_model() -> Callable[..., DiffusionModel]:
    """A function (tied=True, seed=0, **config) → a random DiT of hidden size 64 and two blocks."""

    def make(*, tied: bool = True, seed: int = 0, **changes: Any) -> DiffusionModel:
        config = CONFIG | changes
        family = family_named("dit")
        torch.manual_seed(seed)
        denoiser: Any = family.build(config)
        if tied:
            for block in denoiser.transformer_blocks:
                block.norm1.emb = denoiser.transformer_blocks[0].norm1.emb
        return DiffusionModel(
            name="tiny",
            source=ModelSource("random", "random:tiny", "", seed),
            family=family,
            denoiser=denoiser,
            config=config,
            scheduler_config={"_class_name": "DDIMScheduler", "num_train_timesteps": 1000},
            class_names=("a", "b", "c", "d", "é"),
        )

    return make


@dataclass
class Quantized:
    """A model, how it was quantized, and the checkpoint of it."""

    model: DiffusionModel
    plan: QuantizationPlan
    weights: dict[str, QuantizedWeight]
    checkpoint: QuantizedCheckpoint


@pytest.fixture(scope="session")
def make_quantized(make_model: Callable[..., DiffusionModel]) -> Callable[..., Quantized]:
    """A function (scheme, layers={name: scheme}, **model) → `Quantized`, by round-to-nearest."""

    def make(
        scheme: LayerScheme, layers: Mapping[str, LayerScheme] | None = None, **changes: Any
    ) -> Quantized:
        model = make_model(**changes)
        plan = uniform_plan("w4a8", scheme, model.linears)
        plan = QuantizationPlan("w4a8", dict(plan.layers) | dict(layers or {}))
        weights = {
            spec.name: quantize_weight_nearest(
                model.denoiser.get_submodule(spec.name).weight, plan[spec.name]
            )
            for spec in model.linears
            if plan[spec.name].quantizes_weights
        }
        provenance, metrics = {"method": "nearest", "seed": 0}, {"error": 0.125}
        checkpoint = QuantizedCheckpoint.from_result(model, plan, weights, provenance, metrics)
        return Quantized(model, plan, weights, checkpoint)

    return make


@pytest.fixture(scope="session")
def save_dit() -> Callable[..., Path]:
    """A function (folder, **config) → the folder, with a random DiT of 2 blocks, hidden 64 and
    32×32×3 pixels as diffusers saves it; adaLN is away from zero, as in a trained one."""

    def save(folder: Path, **changes: Any) -> Path:
        from diffusers import DDIMScheduler, DiTTransformer2DModel

        torch.manual_seed(0)
        config = {
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "in_channels": 3,
            "out_channels": 3,
            "num_layers": 2,
            "sample_size": 32,
            "patch_size": 4,
            "num_embeds_ada_norm": 10,
            "norm_eps": 1e-5,
            "norm_elementwise_affine": False,
            "activation_fn": "gelu-approximate",
            "attention_bias": True,
            "norm_type": "ada_norm_zero",
        }
        model = DiTTransformer2DModel(**config | changes)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.05)
        model.save_pretrained(folder / "transformer")
        DDIMScheduler().save_pretrained(folder / "scheduler")
        return folder

    return save
