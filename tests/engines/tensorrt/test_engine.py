"""The engine class: the file's numbers, whatever the version, with graphs and buffers reused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from qdit.engines.onnxruntime_engine import OnnxRuntimeEngine
from qdit.engines.tensorrt.engine import TensorRtEngine
from qdit.engines.tensorrt.settings import BatchProfile, BuildSettings
from qdit.engines.tensorrt.store import stored_engine
from qdit.errors import ArtifactError, InputError, StepError
from qdit.progress import Silent

from ...export.conftest import example_arrays
from ...export.tensorrt.conftest import Traced
from .conftest import Fake, faked

SETTINGS = BuildSettings(BatchProfile(1, 2, 4))


@pytest.fixture
def engine(fake: Fake, int8_file: Path) -> TensorRtEngine:
    return stored_engine(int8_file, SETTINGS, fake.features, Silent()).open()


def test_it_has_the_file_s_names_dtypes_and_shapes(engine: TensorRtEngine, int8_file: Path) -> None:
    file = OnnxRuntimeEngine(int8_file)
    assert engine.input_specs == file.input_specs
    assert engine.output_specs == file.output_specs
    assert engine.batch_profile == (1, 2, 4)


def test_int64_inputs_are_int32_in_old_versions(fake: Fake, engine: TensorRtEngine) -> None:
    wanted = np.int64 if fake.features.strongly_typed else np.int32
    assert engine.native_dtypes()["timestep"] == wanted


@pytest.mark.parametrize("batch", [1, 3])
def test_it_gives_the_file_s_numbers(
    engine: TensorRtEngine, int8_file: Path, traced: Traced, batch: int
) -> None:
    arrays = example_arrays(traced.model, batch)
    made = engine.infer(arrays)["sample"]
    (wanted,) = onnxruntime.InferenceSession(str(int8_file)).run(None, arrays)
    np.testing.assert_array_equal(made, wanted)


def test_a_batch_size_is_captured_once_and_replayed(
    fake: Fake, engine: TensorRtEngine, traced: Traced
) -> None:
    arrays = [example_arrays(traced.model, 2, seed) for seed in range(4)]
    outputs = [engine.infer(given)["sample"].copy() for given in arrays]
    assert (fake.device.graphs, fake.device.replays) == (1, 3)
    engine.infer(example_arrays(traced.model, 1))  # fits into the buffers: another graph
    assert fake.device.graphs == 2
    again = engine.infer(arrays[0])["sample"]
    np.testing.assert_array_equal(again, outputs[0])
    assert fake.device.graphs == 2  # that of two samples is still there
    assert not np.array_equal(outputs[0], outputs[1])


def test_graphs_go_when_buffers_move(fake: Fake, engine: TensorRtEngine, traced: Traced) -> None:
    small, large = example_arrays(traced.model, 1), example_arrays(traced.model, 4)
    first = engine.infer(small)["sample"].copy()
    engine.infer(large)
    np.testing.assert_array_equal(engine.infer(small)["sample"], first)
    assert fake.device.graphs == 3


def test_without_graphs(fake: Fake, int8_file: Path, traced: Traced) -> None:
    made = stored_engine(int8_file, SETTINGS, fake.features, Silent())
    with TensorRtEngine(made.path, graphs=False) as engine:
        engine.infer(example_arrays(traced.model, 2))
        engine.infer(example_arrays(traced.model, 2))
    assert (fake.device.graphs, fake.device.launches) == (0, 2)


def test_8_6_refuses_a_second_context_where_profiles_are_not_shared(
    int8_files: dict[bool, Path], tmp_path: Path, traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an engine was before the builder was asked for it: an error, and no wrong numbers."""
    path = Path(shutil.copy(int8_files[False], tmp_path / "int8.onnx"))
    with faked("8.6.0") as old:
        monkeypatch.delattr(old.module, "PreviewFeature")
        made = stored_engine(path, SETTINGS, old.features, Silent())
        assert made.manifest.preview_features == []
        with made.open() as engine, pytest.raises(StepError, match="chosen by another IExecution"):
            engine.infer(example_arrays(traced.model, 2))


def test_close_frees_the_device(fake: Fake, engine: TensorRtEngine, traced: Traced) -> None:
    engine.infer(example_arrays(traced.model, 2))
    assert fake.device.memory
    engine.close()
    engine.close()
    assert not fake.device.memory
    with pytest.raises(InputError, match="is closed; open it again"):
        engine.infer(example_arrays(traced.model, 2))


def test_batches_outside_the_profile_are_refused(engine: TensorRtEngine, traced: Traced) -> None:
    with pytest.raises(InputError, match=r"batches of 1 … 4, got 5; .*--batch-profile"):
        engine.infer(example_arrays(traced.model, 5))


def test_inputs_that_do_not_fit_are_refused(engine: TensorRtEngine, traced: Traced) -> None:
    arrays = example_arrays(traced.model, 2)
    with pytest.raises(InputError, match="input timestep must be int64, got int32"):
        engine.infer(arrays | {"timestep": arrays["timestep"].astype(np.int32)})


def test_a_damaged_engine_is_refused(engine: TensorRtEngine) -> None:
    engine.path.write_bytes(b"\x00" * 64)
    with pytest.raises(ArtifactError, match=r"cannot load .* plan is damaged"):
        TensorRtEngine(engine.path)


def test_a_missing_engine_is_refused(fake: Fake, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no engine at"):
        TensorRtEngine(tmp_path / "none.engine")


def test_times_are_the_events_own(engine: TensorRtEngine, traced: Traced) -> None:
    assert engine.time_batches(example_arrays(traced.model, 2), 3) == [1.5, 1.5, 1.5]


def test_layers_come_from_the_inspector(engine: TensorRtEngine) -> None:
    kinds = {layer["LayerType"] for layer in engine.layers()}
    assert kinds == {"Reformat", "CaskGemmConvolution"}


def test_cpu_tensors_are_refused(engine: TensorRtEngine, traced: Traced) -> None:
    import torch

    given = {
        name: torch.from_numpy(array.astype(engine.native_dtypes()[name]))
        for name, array in example_arrays(traced.model, 2).items()
    }
    with pytest.raises(InputError, match="must be a contiguous CUDA tensor of float32"):
        engine.run_torch(given)
