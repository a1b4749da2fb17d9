"""What the TensorRT tests of this folder share with those of the lowerings."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qdit.engines.tensorrt import engine as engine_module
from qdit.engines.tensorrt import kernels, library, store
from qdit.engines.tensorrt.library import GpuIdentity
from qdit.export.tensorrt.lower_int8 import LowerInt8Pass
from qdit.export.tensorrt.versions import Features, TensorRtVersion, features

from ...export.conftest import make_small_model
from ...export.tensorrt.conftest import NEW, OLD, Traced, checkpoint_of
from ...export.tensorrt.test_lower_int8 import BY_CHANNEL, static_scales
from .fake_tensorrt import VERSIONS, Device, Faults, fake_driver, fake_runtime, installed, make_fake


@pytest.fixture(scope="session")
def traced() -> Traced:
    return Traced(make_small_model(1))


@dataclass
class Fake:
    """A faked TensorRT of one version, with its device and what goes wrong in it."""

    version: str
    module: Any
    device: Device
    faults: type[Faults]

    @property
    def features(self) -> Features:
        return features(TensorRtVersion.parse(self.version))


@contextmanager
def faked(version: str) -> Iterator[Fake]:
    fresh = {"precisions": {}, "hidden": set(), "regions": [], "kernels": {}}
    device, faults = Device(), type("Fresh", (Faults,), fresh)
    module = make_fake(version, device, faults)
    identity = GpuIdentity("NVIDIA H200", "9.0", "580.1")
    with pytest.MonkeyPatch.context() as patch, installed(module):
        patch.setattr(engine_module, "cuda_runtime", lambda: fake_runtime(device))
        patch.setattr(kernels, "cuda_driver", lambda: fake_driver(device, faults))
        for place in (library, store):
            patch.setattr(place, "gpu_identity", lambda index=0: identity)
        yield Fake(version, module, device, faults)


@pytest.fixture(params=VERSIONS)
def fake(request: pytest.FixtureRequest) -> Iterator[Fake]:
    with faked(request.param) as made:
        yield made


@pytest.fixture
def newest() -> Iterator[Fake]:
    with faked(VERSIONS[-1]) as made:
        yield made


@pytest.fixture(scope="session")
def int8_files(traced: Traced, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The `tensorrt-int8` file of the small model, by whether networks are strongly typed."""
    folder = tmp_path_factory.mktemp("int8")
    made = {}
    for wanted in (OLD, NEW):
        checkpoint, contents = checkpoint_of(traced.model, BY_CHANNEL)
        dtype = "float16" if wanted.strongly_typed else "float32"
        lowering = LowerInt8Pass(contents, static_scales(checkpoint), dtype, wanted)  # type: ignore[arg-type]
        path = folder / str(wanted.version) / "tensorrt-int8.onnx"
        made[wanted.strongly_typed] = traced.write(
            contents, lowering, path, wanted, checkpoint
        ).path
    return made


@pytest.fixture
def int8_file(fake: Fake, int8_files: dict[bool, Path], tmp_path: Path) -> Path:
    """A copy of the file for the faked version."""
    return Path(shutil.copy(int8_files[fake.features.strongly_typed], tmp_path / "int8.onnx"))
