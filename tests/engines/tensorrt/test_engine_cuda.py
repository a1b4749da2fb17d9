"""Real engines on a real TensorRT and GPU: the file's numbers, a ledger of INT8, reuse."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from qdit.engines.onnxruntime_engine import OnnxRuntimeEngine
from qdit.engines.tensorrt.ledger import BY_KERNELS, HIDDEN
from qdit.engines.tensorrt.library import installed_features, why_no_engine
from qdit.engines.tensorrt.settings import BatchProfile, BuildSettings
from qdit.engines.tensorrt.store import StoredEngine, stored_engine
from qdit.progress import Silent

from ...export.conftest import example_arrays, relative_error
from ...export.tensorrt.conftest import Traced

_WHY = why_no_engine()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.tensorrt,
    pytest.mark.skipif(bool(_WHY), reason=_WHY or "TensorRT and a GPU are here"),
]
SETTINGS = BuildSettings(BatchProfile(1, 2, 4))


@pytest.fixture(scope="module")
def built(int8_files: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory) -> StoredEngine:
    features = installed_features()
    folder = tmp_path_factory.mktemp("engine")
    path = Path(shutil.copy(int8_files[features.strongly_typed], folder / "tensorrt-int8.onnx"))
    return stored_engine(path, SETTINGS, features, Silent())


def test_every_quantized_linear_runs_in_int8(built: StoredEngine) -> None:
    """8.6 hides all of them in one region (seen on an H100): a proof is asked of later versions."""
    executed = [row.executed for row in built.ledger.rows if row.requested == "INT8"]
    assert len(executed) == 6
    wanted = {"INT8", BY_KERNELS} | (set() if installed_features().strongly_typed else {HIDDEN})
    assert set(executed) <= wanted, built.ledger.rows


@pytest.mark.parametrize("batch", [1, 2, 4, 1])
def test_it_gives_the_file_s_numbers(built: StoredEngine, traced: Traced, batch: int) -> None:
    """Graphs of several batch sizes, replayed in any order."""
    arrays = example_arrays(traced.model, batch)
    reference = OnnxRuntimeEngine(built.path.with_suffix(".onnx")).infer(arrays)["sample"]
    with built.open() as engine:
        for _ in range(3):  # first run, capture, replay
            made = engine.infer(arrays)["sample"]
            assert relative_error(made, reference) <= 2e-2
        again = engine.infer(example_arrays(traced.model, 3))["sample"]
        assert again.shape[0] == 3
        np.testing.assert_array_equal(engine.infer(arrays)["sample"], made)


def test_torch_tensors_go_in_and_out(built: StoredEngine, traced: Traced) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs torch with CUDA")
    arrays = example_arrays(traced.model, 2)
    with built.open() as engine:
        dtypes = engine.native_dtypes()
        tensors = {
            name: torch.from_numpy(array.astype(dtypes[name])).cuda()
            for name, array in arrays.items()
        }
        made = engine.run_torch(tensors)["sample"].cpu().numpy()
        np.testing.assert_array_equal(made, engine.infer(arrays)["sample"])


def test_it_is_reused(built: StoredEngine) -> None:
    path = built.path.with_suffix(".onnx")
    assert stored_engine(path, SETTINGS, installed_features(), Silent()).reused
