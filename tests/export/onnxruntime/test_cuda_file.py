"""The `onnxruntime-cuda` file against the simulation of what it says that it computes.

On a CPU: its operators are the CPU provider's too, in float16. On a GPU with ONNX Runtime's CUDA
provider also there (`pytest -m gpu`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from qdit.calibrate.checkpoint import QuantizedCheckpoint
from qdit.calibrate.model import DiffusionModel
from qdit.calibrate.plan import QuantizationPlan, uniform_plan
from qdit.calibrate.schemes import LayerScheme
from qdit.calibrate.simulate import QuantizedLinear
from qdit.engines.onnxruntime_engine import OnnxRuntimeEngine
from qdit.engines.session_settings import CPU, CUDA, providers_of
from qdit.export.capabilities import computed_plan
from qdit.export.contents import checkpoint_contents
from qdit.export.lower import lower_and_write
from qdit.export.onnxruntime.files import DOMAINS, cuda_lowering, export_onnxruntime_cuda
from qdit.progress import Silent

from ..conftest import Tracer, example_arrays, quantize_nearest, relative_error, run_torch
from ..exported_case import Case as ExportedCase

# Every case of `realize_onnxruntime_cuda`, K being 256 or 1024.
CASES: list[tuple[str, LayerScheme]] = [
    ("nbits-float16", LayerScheme(4, 8, 128, 128)),
    ("nbits-float16", LayerScheme(4, 8, 64, "token", scale_format="integer")),
    ("nbits-float16", LayerScheme(8, 8, "channel", "token")),
    ("nbits-float16", LayerScheme(8, 16, 64, weight_symmetric=False)),
    ("nbits-float16", LayerScheme(3, 8, 32, 32, scale_dtype="float32")),
    ("nbits-float16", LayerScheme(2, 16, 256, weight_symmetric=False)),
    ("nbits-float16", LayerScheme(6, 4, 64, 64, True, False)),
    ("nbits-float16", LayerScheme(4, 16, 128, weight_symmetric=False)),
    ("float", LayerScheme(16, 16)),
]
# A float16 product of K terms, its scales and its result rounded: 2^-11 each, and sums in float32
# or in parts of float16. Four roundings of 2^-11 are what a linear may differ by.
LINEAR_BOUND = 4 * 2.0**-11


class Case(ExportedCase):
    def computed(self) -> QuantizedCheckpoint:
        linears = self.checkpoint.linears
        plan = computed_plan(self.checkpoint.plan, linears, "onnxruntime-cuda")
        return replace(self.checkpoint, plan=plan)


def _export(model: DiffusionModel, half_tracer: Tracer, plan: QuantizationPlan, path: Path) -> Case:
    checkpoint = quantize_nearest(model, plan)
    contents = checkpoint_contents(checkpoint)
    exported = lower_and_write(
        half_tracer.abstract(checkpoint.skeleton(), model),
        contents,
        path,
        dtype="float16",
        progress=Silent(),
        lowering=cuda_lowering(contents),
        domains=DOMAINS,
    )
    return Case(model, checkpoint, exported)


@pytest.fixture(scope="module")
def mixed(small_model: DiffusionModel, half_tracer: Tracer, export_folder: Path) -> Case:
    schemes = [scheme for _, scheme in CASES]
    layers: dict[str, LayerScheme] = {}
    for i, spec in enumerate(small_model.linears):
        scheme = schemes[i % len(schemes)]
        layers[spec.name] = scheme.weight_only() if spec.role == "adaln" else scheme
    assert set(schemes) <= set(layers.values())
    plan = QuantizationPlan("custom", layers)
    return _export(small_model, half_tracer, plan, export_folder / "cuda-mixed.onnx")


@pytest.fixture(scope="module")
def w4a8(small_model: DiffusionModel, half_tracer: Tracer, export_folder: Path) -> Case:
    plan = uniform_plan("w4a8", LayerScheme(4, 8, 128, 128), small_model.linears)
    return _export(small_model, half_tracer, plan, export_folder / "cuda-w4a8.onnx")


@pytest.fixture(
    params=[
        pytest.param(CPU, id="cpu"),
        pytest.param(CUDA, id="cuda", marks=pytest.mark.gpu),
    ]
)
def providers(request: pytest.FixtureRequest) -> list[str]:
    if request.param not in onnxruntime.get_available_providers():
        pytest.skip(f"this ONNX Runtime has no {request.param}: install onnxruntime-gpu")
    return providers_of(request.param)


def test_linears_equal_the_simulation_on_the_same_input(mixed: Case, providers: list[str]) -> None:
    linears = mixed.linears()
    names = sorted({str(entry[key]) for entry in linears.values() for key in ("input", "output")})
    engine = OnnxRuntimeEngine(mixed.path, extra_outputs=names, threads=1, providers=providers)
    values = engine.infer(example_arrays(mixed.model, 3))
    simulation = mixed.computed().build_denoiser(dtype=torch.float32)
    forms = {scheme.weight_only(): form for form, scheme in CASES}
    for name, entry in linears.items():
        assert entry["form"] == forms[mixed.checkpoint.plan[name].weight_only()], name
        given = torch.from_numpy(values[str(entry["input"])]).float()
        module = simulation.get_submodule(name)
        with torch.inference_mode():
            wanted = module(given.to(module.weight.dtype)).numpy()
        assert relative_error(values[str(entry["output"])], wanted) <= LINEAR_BOUND, name


def test_the_denoiser_is_as_near_to_float32_as_the_float16_simulation(
    w4a8: Case, providers: list[str]
) -> None:
    """docs/targets.md: float16 files are at most twice as far as the float16 simulation."""
    computed = w4a8.computed()
    engine = OnnxRuntimeEngine(w4a8.path, threads=1, providers=providers)
    arrays = example_arrays(w4a8.model, 8)
    single, half = (computed.build_denoiser(dtype=d) for d in (torch.float32, torch.float16))
    wanted = run_torch(w4a8.model, single, arrays)
    own = relative_error(run_torch(w4a8.model, half, arrays), wanted)
    assert relative_error(engine.infer(arrays)["sample"], wanted) <= 2 * own


@pytest.mark.gpu
def test_a_captured_graph_computes_the_same(w4a8: Case) -> None:
    if CUDA not in onnxruntime.get_available_providers():
        pytest.skip(f"this ONNX Runtime has no {CUDA}: install onnxruntime-gpu")
    plain = OnnxRuntimeEngine(w4a8.path, providers=providers_of(CUDA))
    graphs = OnnxRuntimeEngine(
        w4a8.path, providers=providers_of(CUDA), provider_options={"enable_cuda_graph": "1"}
    )
    for batch in (2, 4, 2):  # the second shape is captured beside the first, which is kept
        arrays = example_arrays(w4a8.model, batch, seed=batch)
        made, wanted = graphs.infer(arrays)["sample"], plain.infer(arrays)["sample"]
        np.testing.assert_array_equal(made, wanted)


def test_activations_are_recorded_as_unquantized(w4a8: Case) -> None:
    for name, entry in w4a8.linears().items():
        planned = w4a8.checkpoint.plan[name]
        computed = LayerScheme.from_json(entry.get("computes", planned.to_json()))
        assert computed == planned.weight_only()
        assert ("reason" in entry) == planned.quantizes_activations


def test_holds_no_quantizing_and_fuses_attention_and_modulation(w4a8: Case) -> None:
    counts: dict[str, int] = {}
    for node in onnx.load(w4a8.path, load_external_data=False).graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    assert counts["MatMulNBits"] == len(w4a8.checkpoint.linears)
    assert not {"QuantizeLinear", "DequantizeLinear", "Softmax"} & set(counts)
    assert counts["MultiHeadAttention"] == 2
    assert counts["LayerNormalization"] == 2 * 2 + 1


def test_holds_two_integers_a_byte(w4a8: Case) -> None:
    stored = {tensor.name: tensor for tensor in onnx.load(w4a8.path).graph.initializer}
    weight = stored["transformer_blocks.0.ff.net.2.weight"]
    assert len(weight.raw_data) == 256 * 1024 // 2
    scale = stored["transformer_blocks.0.ff.net.2.weight_scale"]
    assert scale.data_type == onnx.TensorProto.FLOAT16


def test_groups_without_a_block_become_float16_at_load(
    small_model: DiffusionModel, half_tracer: Tracer, tmp_path: Path
) -> None:
    """K = 256 has no group of 144, so the rule is met by a block list without its divisors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qdit.export.onnxruntime.cuda_rules.CUDA_BLOCKS", (96,))
        plan = uniform_plan("w4a8", LayerScheme(4, 8, 128, 128), small_model.linears)
        case = _export(small_model, half_tracer, plan, tmp_path / "model.onnx")
    assert {entry["form"] for entry in case.linears().values()} == {"dequantized"}
    arrays = example_arrays(case.model, 2)
    wanted = run_torch(case.model, case.computed().build_denoiser(dtype=torch.float32), arrays)
    assert relative_error(OnnxRuntimeEngine(case.path).infer(arrays)["sample"], wanted) <= 5e-3


def test_is_the_export_of_the_module(w4a8: Case, tmp_path: Path) -> None:
    exported = export_onnxruntime_cuda(w4a8.checkpoint, tmp_path / "model.onnx")
    assert exported.dtype == "float16"
    arrays = example_arrays(w4a8.model, 2)
    made = OnnxRuntimeEngine(exported.path).infer(arrays)["sample"]
    np.testing.assert_array_equal(made, OnnxRuntimeEngine(w4a8.path).infer(arrays)["sample"])


def test_its_simulation_quantizes_weights_alone(w4a8: Case) -> None:
    denoiser = w4a8.computed().build_denoiser(dtype=torch.float32)
    linears = [m for m in denoiser.modules() if isinstance(m, QuantizedLinear)]
    assert linears
    assert not any(linear.scheme.quantizes_activations for linear in linears)
