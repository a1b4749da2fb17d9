"""A whole `tensorrt-plugin` file in ONNX Runtime: the function bodies are the simulation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.utils
import onnxruntime
import pytest
import torch

from qdit.calibrate.checkpoint import QuantizedCheckpoint
from qdit.calibrate.schemes import LayerScheme
from qdit.engines.onnxruntime_engine import OnnxRuntimeEngine
from qdit.engines.tensorrt.plugin.packing import Packing
from qdit.errors import InputError
from qdit.export.tensorrt.lower_plugin import LowerPluginPass
from qdit.export.tensorrt.rules import check_file

from ...export.conftest import example_arrays, relative_error, run_torch
from ...export.tensorrt.conftest import NEW, Traced, checkpoint_of

# Inputs and weights are those of the simulation, sums are float32, the output is rounded to float16
# once: 2^-11 of each value.
SAME_INPUT = 2.0**-11


@dataclass(frozen=True)
class Written:
    traced: Traced
    checkpoint: QuantizedCheckpoint
    path: Path


@pytest.fixture(scope="module")
def written(traced: Traced, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Every kind of linear in one block: groups, zero points, integer scales, weight-only, none."""
    checkpoint, contents = checkpoint_of(
        traced.model,
        LayerScheme(4, 8, 64, 64),
        attention_qkv=LayerScheme(4, 8, 128, "token", scale_format="integer"),
        attention_out=LayerScheme(8, 8, 64, 128, False, False),
        mlp_in=LayerScheme(4, 8, 64, 32),
        mlp_out=LayerScheme(16, 16),
    )
    path = tmp_path_factory.mktemp("plugin") / "model.onnx"
    lowering = LowerPluginPass(contents, Packing(), "float16")
    traced.write(contents, lowering, path, NEW, checkpoint, "tensorrt-plugin")
    return Written(traced, checkpoint, path)


def records(path: Path) -> dict[str, dict[str, Any]]:
    props = onnx.load(path).metadata_props
    (entry,) = (e.value for e in props if e.key == "qdit.linears")
    found: dict[str, dict[str, Any]] = json.loads(entry)
    return found


def test_every_linear_is_the_simulation_on_its_input(written: Written) -> None:
    """Cut out of the file: in the whole of it ONNX Runtime keeps float32 between float16 nodes, and
    linears read other values than the ones that it shows."""
    model = onnx.load(written.path)
    extractor = onnx.utils.Extractor(onnx.shape_inference.infer_shapes(model))
    exact = written.checkpoint.build_denoiser(dtype=torch.float32)
    generator = np.random.default_rng(0)
    for name, entry in records(written.path).items():
        shape = (
            (2, entry["in_features"]) if entry["role"] == "adaln" else (2, 64, entry["in_features"])
        )
        given = generator.normal(size=shape).astype(np.float16)
        alone = extractor.extract_model([entry["input"]], [entry["output"]])
        session = onnxruntime.InferenceSession(alone.SerializeToString())
        (made,) = session.run(None, {str(entry["input"]): given})
        with torch.inference_mode():
            wanted = exact.get_submodule(name)(torch.from_numpy(given).float()).numpy()
        # a linear whose weights are no integers rounds those as well
        bound = SAME_INPUT if entry["precision"] == "PLUGIN" else 2 * SAME_INPUT
        assert relative_error(made, wanted) <= bound, name


def test_the_denoiser_is_as_near_full_precision_as_the_simulation(written: Written) -> None:
    double = written.checkpoint.build_denoiser(dtype=torch.float64)
    half = written.checkpoint.build_denoiser(dtype=torch.float16)
    engine = OnnxRuntimeEngine(written.path)
    distance = own = 0.0
    for batch in (1, 3, 8):
        arrays = example_arrays(written.traced.model, batch, seed=batch)
        exact = run_torch(written.traced.model, double, arrays)
        simple = run_torch(written.traced.model, half, arrays).astype(np.float64)
        made = engine.infer(arrays)["sample"].astype(np.float64)
        distance += float(np.square(made - exact).sum())
        own += float(np.square(simple - exact).sum())
    assert distance**0.5 <= 2 * own**0.5


def test_the_file_is_as_small_as_its_integers(written: Written) -> None:
    model = onnx.load(written.path)
    weights = {v.name: v for v in model.graph.initializer}
    packed = weights["transformer_blocks.0.ff.net.0.proj.weight"]
    assert len(packed.raw_data) == 1024 * 256 // 2  # two nibbles a byte


def test_functions_are_those_that_nodes_use(written: Written) -> None:
    model = onnx.load(written.path)
    used = {node.op_type for node in model.graph.node if node.domain == "qdit"}
    assert {function.name for function in model.functions} == used
    assert used == {
        "GroupQuantRows",
        "GroupQuantRowsAsymmetricSums",
        "GroupQuantLinearW4",
        "GroupQuantLinearW4Multipliers",
        "GroupQuantLinearW8WeightZeroInputZero",
        "GroupQuantWeightOnlyW4",
    }


def test_q_k_and_v_read_one_quantization(written: Written) -> None:
    model = onnx.load(written.path)
    rows = [node.name for node in model.graph.node if node.op_type.startswith("GroupQuantRows")]
    assert rows == [
        "transformer_blocks.0.attn1.input/rows",
        "transformer_blocks.0.attn1.to_out.0.input/rows",
        "transformer_blocks.0.ff.net.0.proj.input/rows",
    ]


def test_float32_files_are_refused(traced: Traced) -> None:
    _, contents = checkpoint_of(traced.model, LayerScheme(4, 8, 64, 64))
    with pytest.raises(InputError, match="compute in float16, got float32"):
        LowerPluginPass(contents, Packing(), "float32")


def test_it_keeps_the_rules_of_the_versions_that_have_plugins(written: Written) -> None:
    assert check_file(written.path, "11") == []
    assert {violation.rule for violation in check_file(written.path, "10.8")} == {"R3"}
