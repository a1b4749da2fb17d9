"""Targets that run in ONNX Runtime, through the same engine that an export is proved with."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from ...session_settings import CpuKernels, providers_of
from ..target import Inputs, Prepared, Runner, RunSettings

_PROFILE_WARM_UP, _PROFILED_RUNS = 2, 5

if TYPE_CHECKING:  # what only the parent needs must not count as the worker's memory
    from ..operator_times import OperatorTime
    from ..subject import Subject


class OnnxRuntimeRunner:
    """One ONNX file on the CPU, or on a GPU by the CUDA provider (never a silent fallback)."""

    weight_bytes: int | None = None

    def __init__(
        self,
        path: Path,
        settings: RunSettings,
        *,
        fold_weights: bool = True,
        kernels: CpuKernels = "auto",
    ) -> None:
        from ...onnxruntime_engine import OnnxRuntimeEngine

        self.device = settings.device
        self._open = partial(
            OnnxRuntimeEngine,
            path,
            providers=providers_of(settings.provider, settings.device),
            session_options=settings.session_options,
            provider_options=settings.provider_options,
            threads=settings.threads,
            fold_weights=fold_weights,
            kernels=kernels,
        )
        self._engine = self._open()
        self.products = self._engine.kernels.note or None
        self._inputs: dict[str, np.ndarray] = {}
        self._outputs: dict[str, np.ndarray] = {}

    def bind(self, inputs: Inputs) -> None:
        self._inputs = dict(inputs)

    def run(self) -> None:
        self._outputs = self._engine.infer(self._inputs)

    def profile(self) -> list[OperatorTime]:
        """In a session of its own, which profiling slows down; the other one is closed for it."""
        from ..operator_times import from_onnxruntime

        self._engine.close()
        with TemporaryDirectory(prefix="qdit-profile-") as folder:
            engine = self._open(profile_folder=Path(folder), self_test=False)
            for _ in range(_PROFILE_WARM_UP + _PROFILED_RUNS):
                engine.infer(self._inputs)
            times = from_onnxruntime(engine.end_profiling(), _PROFILE_WARM_UP)
            engine.close()
        self._engine = self._open()
        return times

    def output(self) -> np.ndarray:
        (output,) = self._outputs.values()
        return output.astype(np.float32)

    def device_memory(self) -> int | None:
        return None  # ONNX Runtime does not tell what it allocated


class FullPrecision:
    """The full-precision model as ONNX, float32."""

    def prepare(self, subject: Subject, folder: Path) -> Prepared:
        from ....export.full_precision import export_full_precision

        path = folder / "model.onnx"
        export_full_precision(subject.full_precision(), path)
        return Prepared({"path": str(path)}, onnx_bytes(path))

    def load(self, prepared: Prepared, settings: RunSettings) -> Runner:
        return OnnxRuntimeRunner(Path(prepared.settings["path"]), settings)


class HalfPrecision(FullPrecision):
    """The full-precision model as ONNX in float16, attention and modulation fused.

    As the target `onnxruntime-cuda` but for its weights: what quantizing them gains and costs.
    """

    def prepare(self, subject: Subject, folder: Path) -> Prepared:
        from ....export.full_precision import export_full_precision
        from ....export.onnxruntime.files import full_precision_lowering

        path = folder / "model.onnx"
        export_full_precision(
            subject.full_precision(), path, dtype="float16", lowering=full_precision_lowering
        )
        return Prepared({"path": str(path)}, onnx_bytes(path))


class Qdq:
    """The quantized model as its standard ONNX file, weights dequantized once at load."""

    fold_weights = True

    def prepare(self, subject: Subject, folder: Path) -> Prepared:
        path = subject.qdq_file()
        return Prepared({"path": str(path)}, onnx_bytes(path))

    def load(self, prepared: Prepared, settings: RunSettings) -> Runner:
        path = Path(prepared.settings["path"])
        return OnnxRuntimeRunner(path, settings, fold_weights=self.fold_weights)


class QdqPacked(Qdq):
    """The same file with its weights left packed: less memory, dequantized in every run."""

    fold_weights = False


class OnnxRuntimeTarget:
    """The file of the target `onnxruntime`: the exported folder's own, else written from it."""

    target = "onnxruntime"

    def prepare(self, subject: Subject, folder: Path) -> Prepared:
        from ....calibrate.checkpoint import QuantizedCheckpoint
        from ...targets.onnxruntime_files import ONNXRUNTIME_FILES

        file, checkpoint = ONNXRUNTIME_FILES[self.target], subject.quantized_folder()
        path = file.path(checkpoint)
        if not path.is_file():
            path = folder / "model.onnx"
            file.exported(QuantizedCheckpoint.read(checkpoint), path)
        return Prepared({"path": str(path)}, onnx_bytes(path))

    def load(self, prepared: Prepared, settings: RunSettings) -> Runner:
        path = Path(prepared.settings["path"])
        return OnnxRuntimeRunner(path, settings, kernels=settings.cpu_kernels)


class OnnxRuntimeCudaTarget(OnnxRuntimeTarget):
    """The file of the target `onnxruntime-cuda`, likewise."""

    target = "onnxruntime-cuda"


def onnx_bytes(path: Path) -> int:
    """Bytes of an ONNX file and of the external data files that it names."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    graph = onnx.load(path, load_external_data=False).graph
    data = {
        ExternalDataInfo(tensor).location
        for tensor in graph.initializer
        if uses_external_data(tensor)
    }
    return sum(file.stat().st_size for file in (path, *(path.parent / name for name in data)))
