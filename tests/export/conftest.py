"""A small DiT and its exports, made once for all tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from qdit.calibrate.checkpoint import QuantizedCheckpoint
from qdit.calibrate.families import family_named
from qdit.calibrate.model import DiffusionModel, ModelSource
from qdit.calibrate.plan import QuantizationPlan
from qdit.calibrate.quantizers import quantize_weight_nearest
from qdit.export import write
from qdit.export.contents import checkpoint_contents
from qdit.export.full_precision import export_full_precision
from qdit.export.lower import lower_and_write
from qdit.export.opsets import ComputeDtype
from qdit.export.trace import trace
from qdit.export.write import ExportedModel
from qdit.progress import Silent

SMALL_CONFIG = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": 3,
    "out_channels": 6,
    "num_layers": 2,
    "sample_size": 16,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
}


def make_small_model(blocks: int = 2) -> DiffusionModel:
    """Hidden 256, 64 tokens, learned sigma; random weights, one embedder in all blocks."""
    torch.manual_seed(0)
    family = family_named("dit")
    config = SMALL_CONFIG | {"num_layers": blocks}
    denoiser = family.build(config)
    embedder = denoiser.transformer_blocks[0].norm1.emb
    for block in denoiser.transformer_blocks:
        block.norm1.emb = embedder
    source = ModelSource("random", "small", "", 0)
    return DiffusionModel("small", source, family, denoiser, config, {})


def quantize_nearest(model: DiffusionModel, plan: QuantizationPlan) -> QuantizedCheckpoint:
    """A checkpoint by round to nearest; the model is left as it is."""
    weights = {
        spec.name: quantize_weight_nearest(
            model.denoiser.get_submodule(spec.name).weight, plan[spec.name]
        )
        for spec in model.linears
        if plan[spec.name].quantizes_weights
    }
    return QuantizedCheckpoint.from_result(model, plan, weights, {"weights": "nearest"}, {})


def example_arrays(model: DiffusionModel, batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs of the exported model by name."""
    generator = torch.Generator().manual_seed(seed)
    specs = model.family.inputs(model.denoiser)
    tensors = model.family.example_inputs(model.denoiser, batch, generator)
    return {spec.name: tensor.numpy() for spec, tensor in zip(specs, tensors, strict=True)}


def run_torch(
    model: DiffusionModel, denoiser: torch.nn.Module, arrays: dict[str, np.ndarray]
) -> np.ndarray:
    """The denoiser's raw output on `arrays`."""
    with torch.inference_mode():
        inputs = [torch.from_numpy(array) for array in arrays.values()]
        output: np.ndarray = model.family.forward(denoiser, *inputs).numpy()
    return output


def relative_error(one: np.ndarray, other: np.ndarray) -> float:
    """Frobenius norm of the difference over that of `other`, in float64."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


class Tracer:
    """`export_qdq` for many plans of one model: it is traced once, which takes longest."""

    def __init__(self, dtype: ComputeDtype = "float32") -> None:
        self.dtype: ComputeDtype = dtype
        self._proto: onnx.ModelProto | None = None

    def abstract(self, skeleton: torch.nn.Module, model: DiffusionModel) -> ir.Model:
        """The abstract model of `model`, a new one at each call."""
        if self._proto is None:
            traced = trace(skeleton, model.family, model.linears, dtype=self.dtype, opset=21)
            self._proto = ir.to_proto(traced)
        return ir.from_proto(self._proto)

    def export(
        self, model: DiffusionModel, checkpoint: QuantizedCheckpoint, path: Path
    ) -> ExportedModel:
        abstract = self.abstract(checkpoint.skeleton(), model)
        contents = checkpoint_contents(checkpoint)
        return lower_and_write(abstract, contents, path, dtype=self.dtype, progress=Silent())


@pytest.fixture(scope="session")
def tracer() -> Tracer:
    return Tracer()


@pytest.fixture(scope="session")
def half_tracer() -> Tracer:
    return Tracer("float16")


@pytest.fixture(scope="session")
def small_model() -> DiffusionModel:
    return make_small_model()


@dataclass(frozen=True)
class FullPrecision:
    """A one-block model whose weights float16 holds exactly, and its export."""

    model: DiffusionModel
    exported: ExportedModel


@pytest.fixture(scope="session")
def full_precision(export_folder: Path) -> FullPrecision:
    model = make_small_model(blocks=1)
    for parameter in model.denoiser.parameters():
        parameter.data = parameter.data.half().float()  # what a checkpoint stores
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "INLINE_LIMIT", 1000)  # external data, as DiT-XL's 2.7 GB need it
        exported = export_full_precision(model, export_folder / "full.onnx")
    return FullPrecision(model, exported)


@pytest.fixture(scope="session")
def export_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")
