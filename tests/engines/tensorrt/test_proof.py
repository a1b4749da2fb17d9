"""A TensorRT engine under proof, and any batch through its profile, on the stand-in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qdit.engines.gate import FILE_BOUND, Limits, judge
from qdit.engines.tensorrt.chunks import ChunkedEngine
from qdit.engines.tensorrt.proof import TensorRtProof, target_file
from qdit.engines.tensorrt.settings import BatchProfile, BuildSettings
from qdit.engines.tensorrt.store import stored_engine
from qdit.errors import InputError
from qdit.progress import Silent

from ...export.conftest import example_arrays
from ...export.tensorrt.conftest import Traced
from .conftest import Fake, faked


@pytest.fixture
def engine(newest: Fake, int8_files: dict[bool, Path], tmp_path: Path) -> ChunkedEngine:
    path = tmp_path / "tensorrt-int8.onnx"
    path.write_bytes(int8_files[True].read_bytes())
    settings = BuildSettings(BatchProfile(2, 2, 3))
    return ChunkedEngine(stored_engine(path, settings, newest.features, Silent()).open())


@pytest.mark.parametrize("batch", [1, 3, 4, 7])
def test_any_batch_gives_each_sample_s_own_numbers(
    engine: ChunkedEngine, traced: Traced, batch: int
) -> None:
    """1 is filled up to 2; 4 is 3 and 1 filled up; 7 is 3, 3 and 1 filled up."""
    arrays = example_arrays(traced.model, batch)
    made = engine.infer(arrays)["sample"]
    assert len(made) == batch
    for index in range(batch):
        twice = {name: np.repeat(array[index : index + 1], 2, 0) for name, array in arrays.items()}
        alone = engine.infer(twice)["sample"][0]
        np.testing.assert_allclose(made[index], alone, rtol=2e-2, atol=2e-3)


def test_the_denoiser_of_the_sampling_loop(engine: ChunkedEngine, traced: Traced) -> None:
    import torch

    model = traced.model
    inputs = model.family.example_inputs(model.denoiser, 4, torch.Generator().manual_seed(0))
    made = engine.as_denoiser(model.family, model.config)(*inputs)
    arrays = dict(zip(example_arrays(model, 1), (value.numpy() for value in inputs), strict=True))
    raw = torch.from_numpy(engine.infer(arrays)["sample"])
    torch.testing.assert_close(made, model.family.noise_prediction(model.denoiser, raw))
    engine.close()


class TestTargetFile:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "tensorrt").mkdir()
        (tmp_path / "tensorrt" / "tensorrt-int8.onnx").touch()
        return tmp_path

    def test_the_only_one(self, folder: Path) -> None:
        assert target_file(folder, "tensorrt").stem == "tensorrt-int8"
        assert target_file(folder, "tensorrt-int8").stem == "tensorrt-int8"

    def test_more_than_one(self, folder: Path) -> None:
        (folder / "tensorrt" / "tensorrt-int4.onnx").touch()
        with pytest.raises(InputError, match="tensorrt-int4, tensorrt-int8; name one of them"):
            target_file(folder, "tensorrt")

    def test_another_one(self, folder: Path) -> None:
        with pytest.raises(InputError, match="holds tensorrt-int8, got --engine tensorrt-plugin"):
            target_file(folder, "tensorrt-plugin")

    def test_none(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="holds no TensorRT file; export it with"):
            target_file(tmp_path, "tensorrt")


def test_a_file_for_another_tensorrt_is_refused_before_any_build(
    int8_files: dict[bool, Path], tmp_path: Path
) -> None:
    path = tmp_path / "tensorrt-int8.onnx"
    path.write_bytes(int8_files[True].read_bytes())
    problem = r"no file for the installed TensorRT 8\.6.*: R\d+ .* more; export it again here with"
    with faked("8.6.0"), pytest.raises(InputError, match=problem):
        TensorRtProof(path, progress=Silent())
    assert list(tmp_path.iterdir()) == [path]


def test_an_engine_keeps_the_settings_that_it_was_built_with(
    newest: Fake, int8_files: dict[bool, Path], tmp_path: Path
) -> None:
    path = tmp_path / "tensorrt-int8.onnx"
    path.write_bytes(int8_files[True].read_bytes())
    settings = BuildSettings(BatchProfile(1, 2, 5), optimization_level=2)
    stored_engine(path, settings, newest.features, Silent())
    assert TensorRtProof(path, progress=Silent()).stored.reused
    newest.module.__version__ = "11.5.0"
    again = TensorRtProof(path, progress=Silent()).stored
    assert not again.reused
    assert BuildSettings.from_json(again.manifest.settings) == settings


def test_the_gate_of_an_engine_that_shows_no_linears() -> None:
    from dataclasses import replace

    from qdit.engines.parity import DenoiserParity, FileParity
    from qdit.engines.parity_timesteps import DenoiserBound

    from ..report.conftest import apart

    parity = DenoiserParity(
        simulation=apart(0.05),
        engine=apart(0.04),
        bound=DenoiserBound(apart(0.04), apart(0.005), ("float16", "float32"), 8),
        linears=[],
        blocks=[],
        timesteps=[],
        images=2,
        dtype="float16",
        file=FileParity(apart(0.001), apart(0.0005)),
        exact=False,
    )
    names = {check.name: check.outcome for check in judge(parity, None, None, Limits()).checks}
    assert names["engine_vs_file"] == "passed"
    assert "linears_same_input" not in names
    assert "denoiser_bound" not in names
    exact = {c.name: c for c in judge(replace(parity, exact=True), None, None, Limits()).checks}
    assert exact["denoiser_bound"].outcome == "failed"  # 8 times its own distance
    further = FileParity(apart(2 * FILE_BOUND), apart(0.0005))
    worse = judge(replace(parity, file=further), None, None, Limits())
    assert not worse.passed
    assert judge(
        replace(parity, file=FileParity(further.engine, apart(FILE_BOUND))), None, None, Limits()
    ).passed  # where the file itself is that sensitive
    assert "without optimizations, above the bound 0.02" in worse.reason
