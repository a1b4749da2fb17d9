"""The full-precision export: the model unchanged, its numbers kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from qdit.engines.onnxruntime_engine import OnnxRuntimeEngine
from qdit.errors import InputError
from qdit.export.full_precision import export_full_precision

from .conftest import FullPrecision, example_arrays, make_small_model, relative_error, run_torch


def test_computes_what_the_model_does(full_precision: FullPrecision) -> None:
    model, exported = full_precision.model, full_precision.exported
    engine = OnnxRuntimeEngine(exported.path, extra_outputs=["transformer_blocks.0.output"])
    for batch in (1, 3):
        arrays = example_arrays(model, batch)
        made = engine.infer(arrays)
        # float32 rounding over a dozen layers; the demo's own distance from float64 is 3e-7
        assert relative_error(made["sample"], run_torch(model, model.denoiser, arrays)) < 2e-6
        assert made["transformer_blocks.0.output"].shape == (batch, 64, 256)


def test_large_models_use_external_data(full_precision: FullPrecision) -> None:
    exported = full_precision.exported
    assert exported.data_path == exported.path.with_name("full.onnx.data")
    assert exported.data_path.stat().st_size > 0.9 * 4 * full_precision.model.parameter_count()


def test_leaves_the_model_as_it_is(full_precision: FullPrecision) -> None:
    denoiser = full_precision.model.denoiser
    for spec in full_precision.model.linears:
        assert type(denoiser.get_submodule(spec.name)) is torch.nn.Linear
    assert not any(parameter.is_meta for parameter in denoiser.parameters())


def test_float16(tmp_path: Path) -> None:
    model = make_small_model(blocks=1)
    exported = export_full_precision(model, tmp_path / "model.onnx", dtype="float16")
    arrays = example_arrays(model, 2)
    made = OnnxRuntimeEngine(exported.path).infer(arrays)["sample"]
    wanted = run_torch(model, model.denoiser, arrays)
    half = run_torch(model, make_small_model(blocks=1).denoiser.half(), arrays).astype(np.float32)
    assert np.linalg.norm(made - wanted) <= 2 * np.linalg.norm(half - wanted)
    kinds = {t.data_type for t in onnx.load(exported.path).graph.initializer if len(t.dims) == 2}
    assert onnx.TensorProto.FLOAT16 in kinds


@pytest.mark.parametrize("settings", [{"opset": 17}, {"dtype": "int8"}])
def test_refuses_what_cannot_be_written(settings: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be"):
        export_full_precision(make_small_model(1), tmp_path / "model.onnx", **settings)  # type: ignore[arg-type]
