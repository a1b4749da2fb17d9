"""Full precision that comes and goes: what stays of it, and that a proof finds the same figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qdit.calibrate.checkpoint import QuantizedCheckpoint
from qdit.calibrate.families.dit import FAMILY
from qdit.calibrate.model import DiffusionModel, ModelSource
from qdit.calibrate.plan import uniform_plan
from qdit.calibrate.quantizers import quantize_weight_nearest
from qdit.calibrate.schemes import LayerScheme
from qdit.engines.full_precision import FullPrecision
from qdit.engines.options import ProofOptions
from qdit.engines.proof_engine import OnnxRuntimeProof
from qdit.engines.proof_job import ProofJob, prove_and_report
from qdit.engines.workspace import Workspace
from qdit.errors import InputError
from qdit.export.qdq import export_qdq
from qdit.progress import Silent

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
SCHEDULER = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000}


def load() -> DiffusionModel:
    generator = torch.Generator().manual_seed(0)
    denoiser = FAMILY.build(CONFIG)
    for parameter in denoiser.parameters():  # adaLN-zero would switch every block off
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    for block in denoiser.transformer_blocks:
        block.norm1.emb.load_state_dict(denoiser.transformer_blocks[0].norm1.emb.state_dict())
    FAMILY.tie_shared_modules(denoiser)
    source = ModelSource("diffusers", "tiny", "0" * 64)
    return DiffusionModel("tiny", source, FAMILY, denoiser, CONFIG, SCHEDULER)


def output(model: DiffusionModel) -> torch.Tensor:
    x, timestep, label = FAMILY.example_inputs(model.denoiser, 2, torch.Generator().manual_seed(1))
    return model.as_denoiser()(x, timestep, label)


def facts(model: DiffusionModel) -> dict[str, Any]:
    named = model.denoiser.named_parameters()
    return {
        "shapes": {name: (value.shape, value.dtype, value.device) for name, value in named},
        "count": model.parameter_count(),  # ties counted once
        "sample": model.sample_shape,
        "classes": FAMILY.class_count(model.denoiser),
        "linears": model.linears,
    }


def stored_bytes(model: DiffusionModel) -> int:
    return sum(value.untyped_storage().nbytes() for value in model.denoiser.parameters())


class TestFullPrecision:
    def test_away_it_keeps_its_facts_and_four_bytes_a_parameter(self) -> None:
        full = FullPrecision(load, least_bytes=0)
        before = facts(full.model)
        full.put_away()
        assert facts(full.model) == before
        assert stored_bytes(full.model) == 4 * len(before["shapes"])
        with pytest.raises(RuntimeError, match="put away; bring it back"):
            output(full.model)

    def test_brought_back_it_computes_the_same_bits(self) -> None:
        full = FullPrecision(load, least_bytes=0)
        model, before = full.model, output(full.model)
        full.put_away()
        full.put_away()  # a second time changes nothing
        full.bring_back()
        assert full.model is model
        assert torch.equal(output(model), before)

    def test_a_small_model_stays(self) -> None:
        loaded = []
        full = FullPrecision(lambda: loaded.append(1) or load())
        before = output(full.model)
        full.put_away()
        assert torch.equal(output(full.model), before)
        full.bring_back()
        assert len(loaded) == 1

    def test_a_model_that_changed_on_disk_is_refused(self) -> None:
        made = iter(["0" * 64, "f" * 64])

        def changing() -> DiffusionModel:
            model = load()
            return replace(model, source=replace(model.source, sha256=next(made)))

        full = FullPrecision(changing, least_bytes=0)
        full.put_away()
        with pytest.raises(InputError, match=r"tiny changed .*SHA-256 f{12}, before 0{12}"):
            full.bring_back()


def proven(folder: Path, full: FullPrecision) -> dict[str, Any]:
    """The parity section of the report of a proof with images, run in `folder`."""
    model = load()
    plan = uniform_plan("w4a8", LayerScheme(4, 8, 32, 32), model.linears)
    weights = {
        spec.name: quantize_weight_nearest(
            model.denoiser.get_submodule(spec.name).weight, plan[spec.name]
        )
        for spec in model.linears
    }
    QuantizedCheckpoint.from_result(model, plan, weights, {}, {}).write(folder)
    checkpoint = QuantizedCheckpoint.read(folder)
    export_qdq(checkpoint, folder / "model.onnx")
    options = ProofOptions(num_inference_steps=2, guidance_scale=1.0, fid_samples=3)
    workspace = Workspace(folder)
    engine = OnnxRuntimeProof(folder / "model.onnx", "float32")
    job = ProofJob(full, checkpoint, engine, options, workspace, 2, Silent())
    prove_and_report(job, "")
    parity: dict[str, Any] = json.loads((folder / "report.json").read_text())["parity"]
    return parity


def test_a_proof_finds_the_same_figures_when_full_precision_goes_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qdit.engines.parity._FEWEST_ACTIVATIONS", 0)  # the bound is not the point
    loads = []

    def counted() -> DiffusionModel:
        loads.append(1)
        return load()

    kept = proven(tmp_path / "kept", FullPrecision(counted))
    assert len(loads) == 1
    gone = proven(tmp_path / "gone", FullPrecision(counted, least_bytes=0))
    assert len(loads) == 3  # once at first, and once for the images
    assert gone == kept
    assert kept["images"]["samples"] == 3
