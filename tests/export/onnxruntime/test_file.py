"""The `onnxruntime` file against the torch simulation of what it says that it computes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from qdit.calibrate.checkpoint import QuantizedCheckpoint
from qdit.calibrate.model import DiffusionModel
from qdit.calibrate.plan import QuantizationPlan, uniform_plan
from qdit.calibrate.schemes import LayerScheme
from qdit.engines.cpu_kernels import choice
from qdit.engines.cpu_kernels.build import build_library
from qdit.engines.onnxruntime_engine import OnnxRuntimeEngine
from qdit.errors import InputError
from qdit.export.capabilities import computed_plan, realizations
from qdit.export.contents import checkpoint_contents
from qdit.export.lower import lower_and_write
from qdit.export.onnxruntime import files
from qdit.export.onnxruntime.files import (
    DOMAINS,
    check_onnxruntime_dtype,
    export_onnxruntime,
    onnxruntime_lowering,
)
from qdit.progress import Silent

from ..conftest import Tracer, example_arrays, quantize_nearest, relative_error, run_torch
from ..exported_case import Case as ExportedCase

# As for the reference (tests/export/test_qdq.py): sums of the same numbers in another order.
SAME_INPUT_BOUND = 1e-6

_TOKEN = LayerScheme(4, 8, 64, "token", scale_format="integer")
_CHANNEL = LayerScheme(8, 8, "channel", "token")
# Every case of `realize_onnxruntime` with the form that it must take here, K being 256 or 1024.
CASES: list[tuple[str, LayerScheme]] = [
    ("int8", _TOKEN),
    ("int8", replace(_TOKEN, weight_bits=3, weight_group=32)),
    ("int8", replace(_TOKEN, weight_bits=2, scale_dtype="float32")),
    ("int8", replace(_TOKEN, activation_bits=6)),
    ("int8", _CHANNEL),
    ("int8", replace(_CHANNEL, weight_bits=4, activation_bits=4)),
    ("int8", replace(_CHANNEL, weight_bits=6)),
    ("int8", replace(_CHANNEL, weight_symmetric=False)),
    ("int8", replace(_CHANNEL, weight_bits=4, weight_symmetric=False)),
    ("nbits", LayerScheme(4, 8, 32, 32)),
    ("nbits", LayerScheme(4, 8, 64, 64, scale_format="integer")),
    ("nbits", LayerScheme(4, 8, 128, 128, weight_symmetric=False)),
    ("int8", LayerScheme(8, 8, 256, 256)),  # a group of all K is a channel
    ("nbits", LayerScheme(8, 8, 256, 64, weight_symmetric=False)),
    ("nbits", LayerScheme(6, 8, 64, 64, scale_dtype="float32")),
    ("nbits", LayerScheme(3, 8, "channel", 32)),
    ("nbits", LayerScheme(4, 8, 64, "token")),  # finer: groups of 64
    ("nbits", LayerScheme(4, 8, 32, 128)),  # finer: groups of 32
    ("nbits-float", LayerScheme(4, 16, 64)),
    ("nbits-float", LayerScheme(2, 16, "channel", weight_symmetric=False)),
    ("dequantized", LayerScheme(8, 16, 64)),
    ("qdq", LayerScheme(4, 8, 64, 64, True, False)),
    ("qdq", LayerScheme(4, 8, "channel", "token", True, False)),
    ("qdq", LayerScheme(4, 4, 64, 64)),
    ("float", LayerScheme(16, 16)),
]
ADALN: list[tuple[str, LayerScheme]] = [
    ("int8-split", replace(_TOKEN, activation_bits=16)),
    ("nbits-split", LayerScheme(4, 16, 64)),
    ("int8-split", LayerScheme(8, 16, "channel", weight_symmetric=False)),
    ("nbits-split", LayerScheme(8, 16, 32, weight_symmetric=False)),
    ("int8-split", LayerScheme(4, 16, "channel")),
    ("int8-split", LayerScheme(3, 16, 256)),  # likewise
]


class Case(ExportedCase):
    """One exported model and what it was made from."""

    def simulation(self, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """Of what the file computes: the plan, but for finer activation groups."""
        plan = computed_plan(self.checkpoint.plan, self.checkpoint.linears, "onnxruntime")
        return replace(self.checkpoint, plan=plan).build_denoiser(dtype=dtype)


def _export(
    model: DiffusionModel, tracer: Tracer, checkpoint: QuantizedCheckpoint, path: Path
) -> Case:
    abstract = tracer.abstract(checkpoint.skeleton(), model)
    contents = checkpoint_contents(checkpoint)
    exported = lower_and_write(
        abstract,
        contents,
        path,
        dtype="float32",
        progress=Silent(),
        lowering=onnxruntime_lowering(contents),
        domains=DOMAINS,
    )
    return Case(model, checkpoint, exported)


def _mixed(model: DiffusionModel, tracer: Tracer, folder: Path, number: int) -> Case:
    places = [spec.name for spec in model.linears if spec.role != "adaln"]
    adaln = [spec.name for spec in model.linears if spec.role == "adaln"]
    taken = CASES[len(places) * number : len(places) * (number + 1)]
    layers = dict.fromkeys((spec.name for spec in model.linears), LayerScheme(16, 16))
    layers |= {name: scheme for name, (_, scheme) in zip(places, taken, strict=False)}
    layers |= {name: ADALN[len(adaln) * number + i][1] for i, name in enumerate(adaln)}
    checkpoint = quantize_nearest(model, QuantizationPlan("custom", layers))
    return _export(model, tracer, checkpoint, folder / f"onnxruntime{number}.onnx")


@pytest.fixture(scope="session")
def mixed(small_model: DiffusionModel, tracer: Tracer, export_folder: Path) -> list[Case]:
    """Files that hold every scheme of `CASES` and `ADALN` between them."""
    made = [_mixed(small_model, tracer, export_folder, number) for number in range(3)]
    assert len(CASES) <= 3 * 12
    assert len(ADALN) == 3 * 2
    return made


@pytest.fixture(scope="session")
def w4a8(small_model: DiffusionModel, tracer: Tracer, export_folder: Path) -> Case:
    checkpoint = quantize_nearest(small_model, uniform_plan("w4a8", _TOKEN, small_model.linears))
    return _export(small_model, tracer, checkpoint, export_folder / "onnxruntime-w4a8.onnx")


@dataclass(frozen=True)
class LinearRun:
    """A linear as the file runs it: its form, and its error against the simulation."""

    name: str
    scheme: LayerScheme
    form: str
    error: float


def _run_linears(case: Case, **session: Any) -> list[LinearRun]:
    linears = case.linears()
    names = sorted({str(entry[key]) for entry in linears.values() for key in ("input", "output")})
    engine = OnnxRuntimeEngine(case.path, extra_outputs=names, threads=1, **session)
    values = engine.infer(example_arrays(case.model, 3))
    simulation = case.simulation()
    runs = []
    for name, entry in linears.items():
        given = torch.from_numpy(values[str(entry["input"])])
        with torch.inference_mode():
            wanted = simulation.get_submodule(name)(given).numpy()
        error = relative_error(values[str(entry["output"])], wanted)
        runs.append(LinearRun(name, case.checkpoint.plan[name], str(entry["form"]), error))
    return runs


# How a file may be run: as the engine does by itself, with whosever products this machine has;
# with ONNX Runtime's; with our own, the portable ones; and without any optimization.
_RUNS: dict[str, dict[str, Any]] = {
    "engine": {},
    "ONNX Runtime's products": {"kernels": "onnxruntime"},
    "our own products": {"kernels": "auto"},
    "node by node": {"fold_weights": False, "optimize": False},
}


@pytest.fixture(scope="session", params=list(_RUNS))
def runs(mixed: list[Case], request: pytest.FixtureRequest) -> list[LinearRun]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "our own products":
            patch.setattr(choice, "machine_obstacle", lambda: "")
            patch.setattr(choice, "build_library", partial(build_library, "plain"))
            patch.setattr(choice, "library_units", lambda library: "plain C")
        return [run for case in mixed for run in _run_linears(case, **_RUNS[request.param])]


_IDS = [f"{form}:{scheme.label.replace(' ', '')}" for form, scheme in [*CASES, *ADALN]]


class TestLinears:
    @pytest.mark.parametrize(("form", "scheme"), [*CASES, *ADALN], ids=_IDS)
    def test_equal_the_simulation_on_the_same_input(
        self, form: str, scheme: LayerScheme, runs: list[LinearRun]
    ) -> None:
        is_adaln = (form, scheme) in ADALN
        found = [
            run
            for run in runs
            if run.scheme == scheme and run.name.endswith("norm1.linear") == is_adaln
        ]
        assert found
        assert {run.form for run in found} == {form}
        assert max(run.error for run in found) <= SAME_INPUT_BOUND

    def test_finer_activations_are_recorded_and_others_are_not(self, mixed: list[Case]) -> None:
        finer = {}
        for case in mixed:
            for name, entry in case.linears().items():
                planned = case.checkpoint.plan[name]
                computed = LayerScheme.from_json(entry.get("computes", planned.to_json()))
                assert computed.with_float_scales() == replace(
                    planned, activation_group=computed.activation_group, scale_format="float"
                )
                assert ("reason" in entry) == (computed != planned or entry["form"] == "qdq")
                if computed != planned:
                    finer[planned] = computed.activation_group
        assert finer == {LayerScheme(4, 8, 64, "token"): 64, LayerScheme(4, 8, 32, 128): 32}

    def test_a_weight_only_input_is_not_quantized(self, mixed: list[Case]) -> None:
        """Level 4 on the input itself would be off by a thousandth or more."""
        split = [run for case in mixed for run in _run_linears(case) if "split" in run.form]
        assert len(split) == len(ADALN)
        assert max(run.error for run in split) <= SAME_INPUT_BOUND


class TestDenoiser:
    def test_is_no_further_than_twice_the_simulations_own_error(self, w4a8: Case) -> None:
        """The bound of docs/targets.md, one of averages: several runs are summed up."""
        engine = OnnxRuntimeEngine(w4a8.path)
        single, double = w4a8.simulation(), w4a8.simulation(torch.float64)
        distance = own = 0.0
        for batch in (8, 16, 16, 16):
            arrays = example_arrays(w4a8.model, batch, seed=batch + int(own * 1e9) % 97)
            wanted = run_torch(w4a8.model, single, arrays)
            made = engine.infer(arrays)["sample"].astype(np.float64)
            distance += float(np.square(made - wanted).sum())
            own += float(np.square(run_torch(w4a8.model, double, arrays) - wanted).sum())
        assert distance**0.5 <= 2 * own**0.5

    def test_default_session_options_keep_the_meaning(self, mixed: list[Case]) -> None:
        """Anyone may open the file: it must not depend on what our engine sets."""
        for case in mixed[:2]:  # the third holds forms of the reference, which test_qdq.py checks
            arrays = example_arrays(case.model, 8)
            plain = onnxruntime.InferenceSession(str(case.path))
            (made,) = plain.run(None, arrays)
            engine = OnnxRuntimeEngine(case.path, kernels="onnxruntime")
            wanted = engine.infer(arrays)["sample"]
            single, double = case.simulation(), case.simulation(torch.float64)
            exact = run_torch(case.model, double, arrays)
            own = np.linalg.norm(run_torch(case.model, single, arrays) - exact)
            assert np.linalg.norm(made - wanted) <= 2 * own

    def test_does_not_depend_on_the_order_of_the_batch(self, w4a8: Case) -> None:
        arrays = example_arrays(w4a8.model, 3)
        engine = OnnxRuntimeEngine(w4a8.path)
        made = engine.infer(arrays)["sample"]
        turned = engine.infer({name: array[::-1].copy() for name, array in arrays.items()})
        np.testing.assert_array_equal(turned["sample"], made[::-1])


class TestFile:
    def test_unpacks_four_bit_weights_as_it_loads(self, w4a8: Case, tmp_path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        onnxruntime.InferenceSession(str(w4a8.path), options)
        optimized = onnx.load(tmp_path / "optimized.onnx").graph
        kinds = {tensor.data_type for tensor in optimized.initializer}
        assert onnx.TensorProto.INT4 not in kinds
        stored = {tensor.name: tensor for tensor in onnx.load(w4a8.path).graph.initializer}
        assert stored["transformer_blocks.0.ff.net.2.weight"].data_type == onnx.TensorProto.INT4
        products = [n for n in optimized.node if n.op_type == "MatMulIntegerToFloat"]
        assert len(products) == len(w4a8.checkpoint.linears)
        weights = {tensor.name for tensor in optimized.initializer}
        assert all(node.input[1] in weights for node in products)

    def test_large_ones_leave_their_weights_beside_them(
        self, w4a8: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(files, "MAPPED_FROM", 100_000)
        exported = export_onnxruntime(w4a8.checkpoint, tmp_path / "model.onnx")
        assert w4a8.exported.data_path is None
        assert exported.data_path == tmp_path / "model.onnx.data"
        assert exported.data_path.stat().st_size > 10 * exported.path.stat().st_size
        arrays = example_arrays(w4a8.model, 2)
        made = OnnxRuntimeEngine(exported.path).infer(arrays)["sample"]
        wanted = OnnxRuntimeEngine(w4a8.path).infer(arrays)["sample"]
        np.testing.assert_array_equal(made, wanted)

    def test_holds_two_integers_a_byte_and_half_precision_parameters(self, w4a8: Case) -> None:
        weights = sum(spec.weight_count for spec in w4a8.model.linears)
        untouched = sum(value.numel() for value in w4a8.checkpoint.parameters.values())
        table = 4 * 64 * 256  # the position table is no float16
        # a multiplier for each of 64 weights; a scale a channel is among the rounding
        most = weights // 2 + weights // 64 + 2 * untouched + table + 250_000
        assert w4a8.exported.byte_size < most

    def test_attention_and_modulation_are_single_nodes(self, w4a8: Case) -> None:
        counts: dict[str, int] = {}
        for node in onnx.load(w4a8.path, load_external_data=False).graph.node:
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
        assert counts["MultiHeadAttention"] == 2
        assert "Softmax" not in counts
        # two in each block and the final one; nothing multiplies their results
        assert counts["LayerNormalization"] == 2 * 2 + 1
        # q, k, v, out, mlp_in, mlp_out, two gates and adaLN's products in each block; what the
        # first two of adaLN's parts restore; SiLU twice and the timestep's angles
        assert counts["Mul"] - _multipliers(w4a8) == 2 * (6 + 2 + 1) + 2 + 3

    def test_quantizes_what_q_k_and_v_read_once(self, w4a8: Case) -> None:
        graph = onnx.load(w4a8.path, load_external_data=False).graph
        assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == 2 * 4
        # the parts of the embedding, once for all blocks and the final layer
        assert sum(node.op_type == "Round" for node in graph.node) == 3

    def test_names_the_operators_domains(self, w4a8: Case) -> None:
        model = onnx.load(w4a8.path, load_external_data=False)
        assert {(entry.domain, entry.version) for entry in model.opset_import} == {
            ("", 21),
            ("com.microsoft", 1),
        }
        assert {node.domain for node in model.graph.node} == {"", "com.microsoft"}

    @pytest.mark.parametrize("opset", [23])
    def test_newer_opsets_compute_the_same(self, opset: int, w4a8: Case, tmp_path: Path) -> None:
        exported = export_onnxruntime(w4a8.checkpoint, tmp_path / "model.onnx", opset=opset)
        file = onnx.load(exported.path, load_external_data=False)
        assert sum(node.op_type == "MultiHeadAttention" for node in file.graph.node) == 2
        arrays = example_arrays(w4a8.model, 2)
        made = OnnxRuntimeEngine(exported.path).infer(arrays)["sample"]
        np.testing.assert_array_equal(made, OnnxRuntimeEngine(w4a8.path).infer(arrays)["sample"])

    def test_other_compute_dtypes_are_refused(self) -> None:
        with pytest.raises(InputError, match="computes in float32, got --dtype float16"):
            check_onnxruntime_dtype("float16")
        check_onnxruntime_dtype("float32")


def _multipliers(case: Case) -> int:
    """Nodes that multiply weights by their groups' multipliers: folded at load."""
    return sum(scheme.has_integer_scales for scheme in case.checkpoint.plan.layers.values())


def test_realizations_agree_with_the_file(mixed: list[Case]) -> None:
    for case in mixed:
        made = realizations(case.checkpoint.plan, case.checkpoint.linears, "onnxruntime")
        assert {name: entry["form"] for name, entry in case.linears().items()} == {
            name: realization.form for name, realization in made.items()
        }
