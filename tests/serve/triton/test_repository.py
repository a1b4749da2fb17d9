"""A model repository: Triton's own schema reads it, and it holds what its backend will open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import text_format

from qdit.engines.engine import TensorSpec
from qdit.engines.onnxruntime_engine import OnnxRuntimeEngine
from qdit.engines.tensorrt.manifest import EngineManifest
from qdit.errors import ArtifactError, InputError
from qdit.files import sha256_of_file
from qdit.serve.triton.config import TritonModel, schema_module
from qdit.serve.triton.repository import triton_source, write_triton_repository

SAMPLE = TensorSpec("x", np.dtype(np.float32), ("batch", 3, 8, 8))
NUMBER = TensorSpec("t", np.dtype(np.int64), ("batch",))


def read_config(model_folder: Path) -> Any:
    """`config.pbtxt` through Triton's schema, which refuses unknown fields and values."""
    text = (model_folder / "config.pbtxt").read_text("utf-8")
    return text_format.Parse(text, schema_module().ModelConfig())


def test_the_repository_holds_what_the_onnx_file_says(folder: Path, tmp_path: Path) -> None:
    source = triton_source(folder, name="dit", max_batch=16, max_queue=99, delay_us=500)
    made = write_triton_repository(source, tmp_path / "repository")
    assert made == tmp_path / "repository" / "dit"
    assert sorted(path.name for path in (made / "1").iterdir()) == ["model.onnx"]
    config = read_config(made)
    assert (config.name, config.backend, config.max_batch_size) == ("dit", "onnxruntime", 16)
    assert config.default_model_filename == "model.onnx"
    graph = onnx.load(folder / "model.onnx").graph
    assert [tensor.name for tensor in config.input] == [value.name for value in graph.input]
    assert [tensor.name for tensor in config.output] == [value.name for value in graph.output]
    x, timestep, label = config.input
    assert list(x.dims) == [3, 8, 8]
    for single in (timestep, label):  # one number a sample: no axis for the model, one for Triton
        assert list(single.dims) == [1]
        assert single.HasField("reshape")
        assert list(single.reshape.shape) == []
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    assert config.dynamic_batching.default_queue_policy.max_queue_size == 99
    assert set(config.model_warmup[0].inputs) == {tensor.name for tensor in config.input}


def test_the_file_in_the_repository_runs_alone(folder: Path, tmp_path: Path) -> None:
    made = write_triton_repository(triton_source(folder), tmp_path / "repository")
    engines = [OnnxRuntimeEngine(path) for path in (folder / "model.onnx", made / "1/model.onnx")]
    generator = np.random.default_rng(0)
    inputs = {
        "hidden_states": generator.standard_normal((2, 3, 8, 8), dtype=np.float32),
        "timestep": np.array([10, 900]),
        "class_labels": np.array([0, 3]),
    }
    first, second = (engine.infer(inputs) for engine in engines)
    np.testing.assert_array_equal(first["sample"], second["sample"])


def test_external_data_travels_with_its_file(folder: Path, tmp_path: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    onnx.save_model(
        model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data",
        size_threshold=1024,
    )  # fmt: skip
    made = write_triton_repository(triton_source(folder), tmp_path / "repository")
    assert {path.name for path in (made / "1").iterdir()} == {"model.onnx", "model.onnx.data"}
    OnnxRuntimeEngine(made / "1" / "model.onnx").close()


def test_the_onnx_file_is_parsed_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[Path] = []
    load = onnx.load

    def counted(path: Path, **settings: Any) -> onnx.ModelProto:
        parsed.append(path)
        return load(path, **settings)

    monkeypatch.setattr(onnx, "load", counted)
    write_triton_repository(triton_source(folder), tmp_path / "repository")
    assert parsed == [folder / "model.onnx"]


def test_the_faster_form_is_preferred_and_the_reference_can_be_asked_for(folder: Path) -> None:
    fast = folder / "onnxruntime" / "model.onnx"
    fast.parent.mkdir()
    fast.write_bytes((folder / "model.onnx").read_bytes())
    assert triton_source(folder).path == fast
    assert triton_source(folder, "onnxruntime").path == fast
    assert triton_source(folder, "qdq").path == folder / "model.onnx"


def test_on_a_gpu_the_cuda_providers_form_is_preferred(folder: Path) -> None:
    for name in ("onnxruntime", "onnxruntime-cuda"):
        (folder / name).mkdir()
        (folder / name / "model.onnx").write_bytes((folder / "model.onnx").read_bytes())
    assert triton_source(folder, device="cuda").path.parent.name == "onnxruntime-cuda"
    assert triton_source(folder, "onnxruntime").path.parent.name == "onnxruntime"
    assert triton_source(folder, "qdq", device="cuda").path == folder / "model.onnx"


@pytest.mark.parametrize(("version", "dtype"), [("8.6.0", "TYPE_INT32"), ("10.9.0", "TYPE_INT64")])
def test_a_built_tensorrt_engine_is_taken_with_its_profile(
    folder: Path, tmp_path: Path, version: str, dtype: str
) -> None:
    place_engine(folder, "tensorrt-plugin", version, most=32)
    source = triton_source(folder, max_batch=64)
    config = read_config(write_triton_repository(source, tmp_path / "repository"))
    assert (config.backend, config.max_batch_size) == ("tensorrt", 32)
    assert config.instance_group[0].kind == schema_module().ModelInstanceGroup.KIND_GPU
    names = schema_module().DataType
    assert [names.Name(tensor.data_type) for tensor in config.input] == ["TYPE_FP32", dtype, dtype]
    plan = tmp_path / "repository" / source.model.name / "1" / "model.plan"
    assert plan.read_bytes() == b"an engine"


def test_an_engine_is_passed_over_where_a_cpu_is_asked_for(folder: Path) -> None:
    place_engine(folder, "tensorrt-plugin", "10.9.0", most=32)
    assert triton_source(folder, device="cpu").model.backend == "onnxruntime"
    with pytest.raises(InputError, match="has none for 'tensorrt-plugin'"):
        triton_source(folder, "tensorrt-plugin", device="cpu")


def test_what_differs_from_the_plan_is_taken_by_name_only(folder: Path) -> None:
    place_engine(folder, "tensorrt-int8", "10.9.0", most=32)
    assert triton_source(folder).model.backend == "onnxruntime"
    assert triton_source(folder, "tensorrt-int8").model.backend == "tensorrt"


def test_an_engine_that_is_not_the_one_built_is_refused(folder: Path) -> None:
    place_engine(folder, "tensorrt-plugin", "10.9.0", most=32)
    (folder / "tensorrt" / "tensorrt-plugin.engine").write_bytes(b"another one")
    with pytest.raises(ArtifactError, match="is not the engine that its manifest records"):
        triton_source(folder)


def place_engine(folder: Path, target: str, version: str, most: int) -> None:
    """An engine's files as a finished build leaves them; the engine itself is never read here."""
    path = folder / "tensorrt" / f"{target}.onnx"
    path.parent.mkdir()
    path.write_bytes((folder / "model.onnx").read_bytes())
    engine = path.with_suffix(".engine")
    engine.write_bytes(b"an engine")
    settings = {"batch": {"least": 1, "best": 8, "most": most}}
    EngineManifest(version, {"name": "a GPU"}, {}, settings, "", sha256_of_file(engine), 9).write(
        engine.with_name(f"{engine.name}.json")
    )


def test_a_model_is_replaced_whole_and_others_stay(folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    other = repository / "other" / "config.pbtxt"
    other.parent.mkdir(parents=True)
    other.write_text("name: 'other'")
    made = write_triton_repository(triton_source(folder, name="dit"), repository)
    (made / "1" / "stale").write_text("")
    write_triton_repository(triton_source(folder, name="dit", max_batch=4), repository)
    assert read_config(made).max_batch_size == 4
    assert not (made / "1" / "stale").exists()
    assert sorted(path.name for path in repository.iterdir()) == ["dit", "other"]


def test_a_failed_copy_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("shutil.copyfile", fail)
    with pytest.raises(OSError, match="disk full"):
        write_triton_repository(triton_source(folder), tmp_path / "repository")
    assert not list((tmp_path / "repository").iterdir())


def test_the_name_follows_from_the_model(folder: Path) -> None:
    assert triton_source(folder).model.name == "tiny-w4a8"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a/b"}, "a Triton model's name is a folder of letters"),
        ({"name": ".hidden"}, "a Triton model's name is a folder of letters"),
        ({"backend": "tensorrt"}, "a TensorRT engine runs on a GPU, got device cpu"),
        ({"max_batch": 0}, "max_batch of a Triton model must be at least 1, got 0"),
        ({"delay_us": -1}, "delay_us of a Triton model must be at least 0, got -1"),
    ],
)
def test_what_a_server_would_refuse_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TritonModel(**{"name": "m", "backend": "onnxruntime", "inputs": [SAMPLE, NUMBER],
                       "outputs": [SAMPLE]} | change)  # fmt: skip


@pytest.mark.parametrize(
    "spec",
    [
        TensorSpec("x", np.dtype(np.float32), (1, 3)),
        TensorSpec("x", np.dtype(np.float32), ("batch", "height")),
        TensorSpec("x", np.dtype(np.float64), ("batch", 3)),
    ],
    ids=["no batch", "another dynamic axis", "dtype"],
)
def test_tensors_that_triton_cannot_batch_are_refused(spec: TensorSpec) -> None:
    with pytest.raises(InputError, match="Triton"):
        TritonModel("m", "onnxruntime", [spec], [SAMPLE]).config()


@pytest.mark.parametrize(
    ("engine", "device"), [("torch", None), ("tensorrt-int4", None), ("tensorrt-plugin", "cuda")]
)
def test_an_engine_that_the_folder_does_not_have_is_refused(
    folder: Path, engine: str, device: Any
) -> None:
    with pytest.raises(InputError, match="export it with that --target"):
        triton_source(folder, engine, device=device)


def test_a_file_is_no_repository(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="a Triton repository is a folder"):
        write_triton_repository(triton_source(folder), tmp_path / "file")


def test_without_the_schema_the_extra_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tritonclient.grpc", None)
    with pytest.raises(InputError, match=r"pip install qdit\[triton\]"):
        write_triton_repository(triton_source(folder), tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_the_number_of_threads_is_the_backend_s(folder: Path) -> None:
    source = triton_source(folder, threads=3)
    assert source.model.config().parameters["intra_op_thread_count"].string_value == "3"


def test_a_checkpoint_that_is_damaged_is_not_served(folder: Path) -> None:
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00\x01")
    with pytest.raises(Exception, match="weights"):
        triton_source(folder)
