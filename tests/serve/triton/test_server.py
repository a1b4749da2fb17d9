"""On a real Triton server: it takes the configuration, batches calls, and answers as here.

The server of nvidia-pytriton has the Python backend only. So the emitted configuration is taken
twice: as it is, which the server must accept up to the backend that it lacks; and with `backend:
"python"` on a few lines that run the same file in ONNX Runtime, to see requests reshaped, batched
and answered.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qdit.calibrate.checkpoint import QuantizedCheckpoint
from qdit.engines.onnxruntime_engine import OnnxRuntimeEngine
from qdit.errors import InputError
from qdit.serve.triton.client import TritonEngine
from qdit.serve.triton.repository import triton_source, write_triton_repository

BACKEND = """
import pathlib, sys
sys.path.extend(SITE_PACKAGES)
import numpy as np, onnxruntime
import triton_python_backend_utils as pb

class TritonPythonModel:
    def initialize(self, args):
        folder = pathlib.Path(args["model_repository"]) / args["model_version"]
        self.session = onnxruntime.InferenceSession(folder / "model.onnx")
        self.names = [value.name for value in self.session.get_inputs()]

    def execute(self, requests):
        given = [{name: read(request, name) for name in self.names} for request in requests]
        arrays = {name: np.concatenate([one[name] for one in given]) for name in self.names}
        (made,) = self.session.run(None, arrays)
        ends = np.cumsum([len(one[self.names[0]]) for one in given])[:-1]
        name = self.session.get_outputs()[0].name
        tensors = [pb.Tensor.from_dlpack(name, part.copy()) for part in np.split(made, ends)]
        return [pb.InferenceResponse([tensor]) for tensor in tensors]

# By DLPack: the stub was compiled against NumPy 1, and misreads the arrays of NumPy 2.
def read(request, name):
    return np.from_dlpack(pb.get_input_tensor_by_name(request, name)).copy()
"""


def test_the_server_takes_the_configuration_up_to_the_missing_backend(
    folder: Path, tmp_path: Path, serve_repository: Callable[[Path], Any]
) -> None:
    write_triton_repository(triton_source(folder, name="dit"), tmp_path / "repository")
    with serve_repository(tmp_path / "repository") as (_, log):
        text = log.read_text()
    assert "loading: dit:1" in text
    assert "unable to find backend library for backend 'onnxruntime'" in text
    failures = [line for line in text.splitlines() if line.startswith("E") and "dit" in line]
    assert len(failures) == 1, failures


@pytest.fixture
def served(
    folder: Path,
    tmp_path: Path,
    serve_repository: Callable[[Path], Any],
) -> Any:
    """The repository on the Python backend, and the server's address."""
    made = write_triton_repository(
        triton_source(folder, name="dit", max_batch=4, delay_us=20_000), tmp_path / "repository"
    )
    config = made / "config.pbtxt"
    text = config.read_text().replace('backend: "onnxruntime"', 'backend: "python"')
    lines = [line for line in text.splitlines() if "default_model_filename" not in line]
    config.write_text("\n".join(lines))
    here = repr([path for path in sys.path if "site-packages" in path])
    (made / "1" / "model.py").write_text(BACKEND.replace("SITE_PACKAGES", here))
    with serve_repository(tmp_path / "repository") as (address, log):
        yield address, log


def random_inputs(count: int, seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        "hidden_states": generator.standard_normal((count, 3, 8, 8), dtype=np.float32),
        "timestep": generator.integers(0, 1000, count),
        "class_labels": generator.integers(0, 5, count),
    }


def test_it_answers_as_the_file_does_here(folder: Path, served: tuple[str, Path]) -> None:
    here = OnnxRuntimeEngine(folder / "model.onnx")
    with TritonEngine(served[0], "dit") as there:
        assert there.input_specs == tuple(
            type(spec)(spec.name, spec.dtype, ("batch", *spec.shape[1:]))
            for spec in here.input_specs
        )
        for count in (1, 3, 4, 9):  # 9 samples are three calls of at most four
            inputs = random_inputs(count, count)
            np.testing.assert_allclose(
                there.infer(inputs)["sample"], here.infer(inputs)["sample"], atol=1e-5
            )


def test_calls_of_several_clients_are_batched(folder: Path, served: tuple[str, Path]) -> None:
    here = OnnxRuntimeEngine(folder / "model.onnx")

    def ask(seed: int) -> float:
        inputs = random_inputs(1, seed)
        with TritonEngine(served[0], "dit") as there:
            made = there.infer(inputs)["sample"]
        return float(np.abs(made - here.infer(inputs)["sample"]).max())

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(ask, range(32))) < 1e-4
    from tritonclient import http

    statistics = http.InferenceServerClient(served[0]).get_inference_statistics("dit")
    (model,) = statistics["model_stats"]
    assert model["inference_count"] == 32 + 1  # and the warm-up's
    assert model["execution_count"] < 32  # some went together


def test_the_sampling_loop_runs_on_it(folder: Path, served: tuple[str, Path]) -> None:
    checkpoint = QuantizedCheckpoint.read(folder)
    inputs = [torch.from_numpy(array) for array in random_inputs(2, 0).values()]
    here = OnnxRuntimeEngine(folder / "model.onnx")
    with TritonEngine(served[0], "dit") as there:
        made, wanted = (
            engine.as_denoiser(checkpoint.family, checkpoint.config)(*inputs)
            for engine in (there, here)
        )
    torch.testing.assert_close(made, wanted, atol=1e-5, rtol=1e-5)


def test_a_model_that_is_not_there_is_named(served: tuple[str, Path]) -> None:
    with pytest.raises(InputError, match="no model 'other' answers at"):
        TritonEngine(served[0], "other")


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match=r"no model 'dit' answers at 127\.0\.0\.1:9"):
        TritonEngine("127.0.0.1:9", "dit")
