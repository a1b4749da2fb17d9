"""The full-precision export: the model unchanged, its numbers kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from qdit.engines.onnxruntime_engine import OnnxRuntimeEngine
from qdit.errors import InputError
from qdit.export import write
from qdit.export.full_precision import export_full_precision

from .conftest import example_arrays, make_small_model, relative_error, run_torch


def test_computes_what_the_model_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With external data, as DiT-XL's 2.7 GB need it."""
    monkeypatch.setattr(write, "INLINE_LIMIT", 1000)
    model = make_small_model(blocks=1)
    before = {name: id(module) for name, module in model.denoiser.named_modules()}
    exported = export_full_precision(model, tmp_path / "model.onnx")
    assert {name: id(module) for name, module in model.denoiser.named_modules()} == before
    assert exported.data_path == tmp_path / "model.onnx.data"
    for batch in (1, 3):
        arrays = example_arrays(model, batch)
        made = OnnxRuntimeEngine(exported.path).infer(arrays)["sample"]
        # float32 rounding over a dozen layers; the demo's own distance from float64 is 3e-7
        assert relative_error(made, run_torch(model, model.denoiser, arrays)) < 2e-6
    blocks = OnnxRuntimeEngine(exported.path, extra_outputs=["transformer_blocks.0.output"])
    assert "transformer_blocks.0.output" in blocks.infer(arrays)


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
