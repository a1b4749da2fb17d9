"""Targets that run in TensorRT: the files of `--target`, and the unquantized model beside them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ....errors import InputError
from ..target import Inputs, Prepared, Runner, RunSettings

if TYPE_CHECKING:  # what only the parent needs must not count as the worker's memory
    from ....calibrate.checkpoint import QuantizedCheckpoint
    from ...tensorrt.store import StoredEngine
    from ..subject import Subject


class TensorRtRunner:
    """An engine on the GPU; a run is one CUDA graph, inputs and outputs stay there."""

    weight_bytes: int | None = None

    def __init__(self, engine: Path, settings: RunSettings) -> None:
        if not settings.device.startswith("cuda"):
            raise InputError(
                f"TensorRT runs on a GPU, got --device {settings.device}; use --device cuda"
            )
        from ...tensorrt.engine import TensorRtEngine

        self.device = settings.device
        self._engine = TensorRtEngine(engine)

    def bind(self, inputs: Inputs) -> None:
        self._engine.bind(inputs)

    def run(self) -> None:
        self._engine.run()

    def output(self) -> np.ndarray:
        (output,) = self._engine.outputs().values()
        return output.astype(np.float32)

    def device_memory(self) -> int | None:
        return None  # TensorRT does not tell what it allocated


class _TensorRtTarget:
    """What all have in common: an engine, made in the parent and loaded in the worker."""

    def prepare(self, subject: Subject, folder: Path) -> Prepared:
        from ...tensorrt.library import why_no_engine

        if why := why_no_engine():
            raise InputError(why)
        stored = self.engine(subject, folder)
        return Prepared({"engine": str(stored.path)}, stored.manifest.engine_bytes)

    def engine(self, subject: Subject, folder: Path) -> StoredEngine:
        """Write the file and build the engine, or take the ones that are there."""
        raise NotImplementedError

    def load(self, prepared: Prepared, settings: RunSettings) -> Runner:
        return TensorRtRunner(Path(prepared.settings["engine"]), settings)


class HalfPrecision(_TensorRtTarget):
    """The unquantized model in float16: what a quantized engine's speed is held to."""

    def engine(self, subject: Subject, folder: Path) -> StoredEngine:
        from ....export.tensorrt.files import export_baseline
        from ....progress import Silent
        from ...tensorrt.library import installed_features
        from ...tensorrt.settings import BuildSettings
        from ...tensorrt.store import stored_engine

        features = installed_features()
        path = folder / "tensorrt-fp16.onnx"
        export_baseline(subject.full_precision(), path, features)
        return stored_engine(path, BuildSettings(), features, Silent())


class _Quantized(_TensorRtTarget):
    """A target of `--target`: an exported folder's own file, else one made here."""

    target: str

    def engine(self, subject: Subject, folder: Path) -> StoredEngine:
        from ....progress import Silent
        from ...tensorrt.proof import built_engine
        from ...tensorrt.store import FOLDER

        exported = subject.quantized_folder() / FOLDER / f"{self.target}.onnx"
        if exported.is_file():
            return built_engine(exported, Silent())
        return self._made_here(subject, folder)

    def _made_here(self, subject: Subject, folder: Path) -> StoredEngine:
        from ....calibrate.checkpoint import QuantizedCheckpoint
        from ....export.capabilities import check
        from ....progress import Silent
        from ...tensorrt.library import installed_features
        from ...tensorrt.settings import BuildSettings
        from ...tensorrt.target import TensorRtFiles

        checkpoint = QuantizedCheckpoint.read(subject.quantized_folder())
        features = installed_features()
        refused = check(checkpoint.plan, checkpoint.linears, self.target, str(features.version))
        if refused:
            raise InputError(f"{self.target} cannot run {refused[0].layer}: {refused[0].reason}")
        scales = _scales(subject, checkpoint) if self.target == "tensorrt-int8" else {}
        files = TensorRtFiles(checkpoint, folder, features, BuildSettings(), scales, Silent())
        files.write(self.target)
        return files.build(self.target)


def _scales(subject: Subject, checkpoint: QuantizedCheckpoint) -> dict[str, float]:
    """Static scales from random inputs: speed does not depend on their values."""
    import torch

    from ....calibrate.calibration_set import CalibrationSet
    from ....calibrate.input_ranges import collect_input_ranges

    denoiser = checkpoint.build_denoiser()
    names = [spec.name for spec in checkpoint.family.inputs(denoiser)]
    arrays = subject.inputs(2)
    samples = CalibrationSet(*(torch.from_numpy(arrays[name]) for name in names))
    ranges = collect_input_ranges(checkpoint.family, denoiser, checkpoint.linears, samples)
    return {name: entry.static_scale() for name, entry in ranges.items()}


class Plugin(_Quantized):
    """The CUDA kernels as plugins."""

    target = "tensorrt-plugin"


class Int8(_Quantized):
    """TensorRT's own INT8 products."""

    target = "tensorrt-int8"


class Int4(_Quantized):
    """Weight-only INT4."""

    target = "tensorrt-int4"
