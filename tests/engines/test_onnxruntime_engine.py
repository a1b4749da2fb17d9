"""The ONNX Runtime engine: what it runs, and what it refuses with which words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from qdit.calibrate.families import family_named
from qdit.engines.engine import Engine
from qdit.engines.onnxruntime_engine import OnnxRuntimeEngine
from qdit.errors import ArtifactError, InputError

_CONFIG = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 1,
    "attention_head_dim": 8,
    "in_channels": 3,
    "out_channels": 6,
    "num_layers": 1,
    "sample_size": 4,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
}


def _write(path: Path, *, external: bool = False) -> Path:
    """hidden_states [batch, 3, 4, 4] → sample [batch, 6, 4, 4]: its double beside zeros.

    timestep and class_labels are added to the first three channels, so that they matter.
    """
    nodes = [
        helper.make_node("Mul", ["hidden_states", "two"], ["doubled"]),
        helper.make_node("Add", ["timestep", "class_labels"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["float_sum"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["float_sum", "axes"], ["shift"]),
        helper.make_node("Add", ["doubled", "shift"], ["epsilon"]),
        helper.make_node("Mul", ["epsilon", "zeros"], ["sigma"]),
        helper.make_node("Concat", ["epsilon", "sigma"], ["sample"], axis=1),
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [
            info("hidden_states", TensorProto.FLOAT, ["batch", 3, 4, 4]),
            info("timestep", TensorProto.INT64, ["batch"]),
            info("class_labels", TensorProto.INT64, ["batch"]),
        ],
        [info("sample", TensorProto.FLOAT, ["batch", 6, 4, 4])],
        [
            numpy_helper.from_array(np.array(2, np.float32), "two"),
            numpy_helper.from_array(np.array([1, 2, 3]), "axes"),
            numpy_helper.from_array(np.zeros((1, 3, 4, 4), np.float32), "zeros"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(
        model, path, save_as_external_data=external, location="weights.bin", size_threshold=100
    )
    return path


def _inputs(batch: int = 2) -> dict[str, np.ndarray]:
    return {
        "hidden_states": np.ones((batch, 3, 4, 4), np.float32),
        "timestep": np.arange(batch),
        "class_labels": np.full(batch, 10),
    }


@pytest.fixture
def engine(tmp_path: Path) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(_write(tmp_path / "model.onnx"), threads=1)


class TestRuns:
    @pytest.mark.parametrize("batch", [1, 3])
    def test_infers_by_name(self, engine: OnnxRuntimeEngine, batch: int) -> None:
        made = engine.infer(_inputs(batch))
        assert list(made) == ["sample"]
        shift = np.arange(batch).reshape(-1, 1, 1, 1)
        np.testing.assert_array_equal(made["sample"][:, :3] - shift, np.full((batch, 3, 4, 4), 12))

    def test_is_an_engine(self, engine: OnnxRuntimeEngine) -> None:
        typed: Engine = engine
        assert [spec.name for spec in typed.input_specs] == list(_inputs())
        assert typed.input_specs[1].dtype == np.int64
        assert typed.output_specs[0].shape == ("batch", 6, 4, 4)

    @pytest.mark.parametrize("external", [False, True], ids=["one file", "external data"])
    def test_returns_inner_values(self, external: bool, tmp_path: Path) -> None:
        path = _write(tmp_path / "model.onnx", external=external)
        before = sorted(file.name for file in tmp_path.iterdir())
        engine = OnnxRuntimeEngine(path, extra_outputs=["shift", "doubled", "sample"])
        made = engine.infer(_inputs())
        assert list(made) == ["sample", "shift", "doubled"]
        assert made["shift"].shape == (2, 1, 1, 1)
        np.testing.assert_array_equal(made["doubled"], np.full((2, 3, 4, 4), 2))
        assert sorted(file.name for file in tmp_path.iterdir()) == before

    def test_inner_values_change_no_output_and_outlive_the_engine(
        self, engine: OnnxRuntimeEngine
    ) -> None:
        inputs = _inputs() | {
            "hidden_states": np.arange(96.0, dtype=np.float32).reshape(4, 4, 3, 2).T
        }
        assert not inputs["hidden_states"].flags.c_contiguous
        inside = OnnxRuntimeEngine(engine.path, extra_outputs=["doubled"])
        made = inside.infer(inputs)
        inside.close()
        np.testing.assert_array_equal(made["sample"], engine.infer(inputs)["sample"])
        np.testing.assert_array_equal(made["doubled"], 2 * inputs["hidden_states"])

    def test_as_denoiser_drops_sigma_and_keeps_the_dtype(self, engine: OnnxRuntimeEngine) -> None:
        denoise = engine.as_denoiser(family_named("dit"), _CONFIG)
        x = torch.ones(2, 3, 4, 4, dtype=torch.float64)
        made = denoise(x, torch.tensor([0, 5]), torch.tensor([1, 1], dtype=torch.int32))
        assert made.dtype == torch.float64
        assert made.shape == x.shape
        assert made[:, 0, 0, 0].tolist() == [3, 8]


class TestRefusals:
    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"no ONNX file at .*nothing\.onnx; export the model"):
            OnnxRuntimeEngine(tmp_path / "nothing.onnx")

    @pytest.mark.parametrize("extra", [(), ("shift",)], ids=["plain", "extra outputs"])
    @pytest.mark.parametrize("keep", [0, 100])
    def test_damaged_file(self, keep: int, extra: tuple[str, ...], tmp_path: Path) -> None:
        path = _write(tmp_path / "model.onnx")
        path.write_bytes(path.read_bytes()[:keep] + b"\xff" * 50)
        with pytest.raises(ArtifactError, match=r"model\.onnx"):
            OnnxRuntimeEngine(path, extra_outputs=extra)

    def test_missing_external_data(self, tmp_path: Path) -> None:
        path = _write(tmp_path / "model.onnx", external=True)
        (tmp_path / "weights.bin").unlink()
        with pytest.raises(ArtifactError, match="cannot load"):
            OnnxRuntimeEngine(path)

    def test_missing_provider(self, tmp_path: Path) -> None:
        path = _write(tmp_path / "model.onnx")
        with pytest.raises(
            InputError, match=r"has no provider NoSuchProvider, it has .*CPUExecution"
        ):
            OnnxRuntimeEngine(path, providers=["NoSuchProvider", "CPUExecutionProvider"])

    def test_unknown_extra_output(self, tmp_path: Path) -> None:
        path = _write(tmp_path / "model.onnx")
        with pytest.raises(
            InputError, match=r"has no value 'shifts' to return; did you mean shift\?"
        ):
            OnnxRuntimeEngine(path, extra_outputs=["shifts"])

    def test_threads(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="threads must be at least 1, got 0"):
            OnnxRuntimeEngine(_write(tmp_path / "model.onnx"), threads=0)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"timestep": None}, "inputs are class_labels, hidden_states, timestep, got"),
            ({"mask": np.zeros(1)}, "got class_labels, hidden_states, mask, timestep"),
            ({"timestep": np.zeros(2, np.float32)}, "timestep must be int64, got float32"),
            ({"timestep": np.zeros((2, 1), np.int64)}, r"must be \[batch=2\], got \[2, 1\]"),
            ({"timestep": np.zeros(3, np.int64)}, r"timestep must be \[batch=2\], got \[3\]"),
            (
                {"hidden_states": np.zeros((2, 3, 8, 8), np.float32)},
                r"hidden_states must be \[batch=2, 3, 4, 4\], got \[2, 3, 8, 8\]",
            ),
        ],
    )
    def test_inputs(
        self, change: dict[str, np.ndarray | None], message: str, engine: OnnxRuntimeEngine
    ) -> None:
        inputs = {k: v for k, v in (_inputs() | change).items() if v is not None}
        with pytest.raises(InputError, match=message):
            engine.infer(inputs)

    def test_a_closed_engine(self, engine: OnnxRuntimeEngine) -> None:
        engine.close()
        with pytest.raises(InputError, match="is closed; open it again"):
            engine.infer(_inputs())


def test_session_options_reach_onnx_runtime(tmp_path: Path) -> None:
    path = _write(tmp_path / "model.onnx")
    OnnxRuntimeEngine(path, session_options={"session.use_env_allocators": "0"})
    with pytest.raises(
        InputError, match=r"is called like session\.use_env_allocators, got 'threads'"
    ):
        OnnxRuntimeEngine(path, session_options={"threads": "2"})
    with pytest.raises(InputError, match="refuses the session option"):
        OnnxRuntimeEngine(path, session_options={"session." + "x" * 3000: "2"})


def test_a_profile_is_written_where_one_was_asked_for(tmp_path: Path) -> None:
    path = _write(tmp_path / "model.onnx")
    engine = OnnxRuntimeEngine(path, profile_folder=tmp_path)
    arrays = {
        "hidden_states": np.zeros((1, 3, 4, 4), np.float32),
        "timestep": np.zeros(1, np.int64),
        "class_labels": np.zeros(1, np.int64),
    }
    engine.infer(arrays)
    written = engine.end_profiling()
    assert written.parent == tmp_path
    assert '"op_name" : "Mul"' in written.read_text()
    with pytest.raises(InputError, match="open it with profile_folder"):
        OnnxRuntimeEngine(path).end_profiling()
