"""The kinds of subject: an exported folder, or a model that is quantized on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...calibrate.blockwise import quantize_model
from ...calibrate.checkpoint import QuantizedCheckpoint
from ...calibrate.families.base import Family
from ...calibrate.model import DiffusionModel
from ...calibrate.plan import QuantizationPlan
from ...calibrate.sources import load_model
from ...errors import InputError
from ...export.qdq import export_qdq
from ...onnx_places import QDQ_FILE
from ...progress import Progress
from .subject import Subject

MANIFEST = "qdit.json"


def open_subject(
    source: str,
    plan_for: Callable[[DiffusionModel], QuantizationPlan],
    *,
    blocks: int | None,
    seed: int,
    device: str,
    work: Path,
    progress: Progress,
) -> Subject:
    """An exported folder where `source` is one, else a model source (see `load_model`).

    Files that must be made are made in `work`.
    """
    folder = Path(source).expanduser()
    if not (folder / MANIFEST).is_file():
        return ModelSubject(source, plan_for, blocks, seed, device, work, progress)
    if blocks is not None:
        raise InputError(
            f"--blocks shortens a model before its export, got it with the exported folder "
            f"{source}; leave it out or name a model source"
        )
    return ExportedSubject(folder, seed)


class ModelSubject:
    """A model source, quantized by rounding to nearest: speed does not depend on the rounding."""

    def __init__(
        self,
        source: str,
        plan_for: Callable[[DiffusionModel], QuantizationPlan],
        blocks: int | None,
        seed: int,
        device: str,
        work: Path,
        progress: Progress,
    ) -> None:
        self.source = source
        self.blocks = blocks
        self.seed = seed
        self.device = device
        self.work = work
        self.progress = progress
        self._plan_for = plan_for
        self._model: DiffusionModel | None = None
        self._folder: Path | None = None
        self._qdq: Path | None = None
        model = self.full_precision()
        self._name = model.name
        self._plan = plan_for(model)
        self._bits = self._plan.effective_weight_bits(model.linears)
        self._outline = _Outline(model.family, model.config, seed)

    def facts(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "model": self._name,
            "blocks": self.blocks,
            "seed": self.seed,
            "plan": _plan_facts(self._plan, self._bits),
        }

    def full_precision(self) -> DiffusionModel:
        if self._model is None:
            self.progress.say(f"loading {self.source}")
            self._model = load_model(**self.full_precision_arguments())
        return self._model

    def full_precision_arguments(self) -> dict[str, Any]:
        return {"source": self.source, "seed": self.seed, "blocks": self.blocks}

    def quantized_folder(self) -> Path:
        if self._folder is None:
            model, self._model = self.full_precision(), None  # quantizing replaces its linears
            result = quantize_model(
                model, self._plan, "nearest", None, device=self.device, progress=self.progress
            )
            checkpoint = QuantizedCheckpoint.from_result(
                model, self._plan, result.weights, {"weights": "nearest"}, {}
            )
            folder = self.work / "checkpoint"
            checkpoint.write(folder)
            self._folder = folder
        return self._folder

    def qdq_file(self) -> Path:
        if self._qdq is None:
            checkpoint = QuantizedCheckpoint.read(self.quantized_folder())
            self.progress.say("exporting the quantized model")
            path = self.work / "qdq" / QDQ_FILE
            path.parent.mkdir(parents=True)
            export_qdq(checkpoint, path, progress=self.progress)
            self._qdq = path
        return self._qdq

    def inputs(self, batch: int) -> dict[str, np.ndarray]:
        return self._outline.inputs(batch)

    def release(self) -> None:
        self._model = None


class ExportedSubject:
    """A folder that `qdit-export` wrote; the full-precision model is the one that it names."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.seed = seed
        checkpoint = QuantizedCheckpoint.read(folder)
        self._source = checkpoint.manifest.model.source
        self._name = checkpoint.manifest.model.name
        self._plan = checkpoint.plan
        self._bits = checkpoint.plan.effective_weight_bits(checkpoint.linears)
        self._outline = _Outline(checkpoint.family, checkpoint.config, seed)
        self._model: DiffusionModel | None = None

    def facts(self) -> dict[str, Any]:
        return {
            "source": str(self.folder),
            "model": self._name,
            "blocks": None,
            "seed": self.seed,
            "plan": _plan_facts(self._plan, self._bits),
        }

    def full_precision(self) -> DiffusionModel:
        if self._model is None:
            arguments = self.full_precision_arguments()
            try:
                model = load_model(**arguments)
            except Exception as error:
                raise InputError(
                    f"the full-precision model that {self.folder} was exported from, "
                    f"{arguments['source']!r}, cannot be loaded: {error}"
                ) from error
            if model.source.sha256 != self._source.sha256:
                raise InputError(
                    f"{arguments['source']!r} is no longer the model that {self.folder} was "
                    "exported from (its weights' SHA-256 differs); export it again"
                )
            self._model = model
        return self._model

    def full_precision_arguments(self) -> dict[str, Any]:
        source = None if self._source.kind == "demo" else self._source.location
        return {"source": source, "seed": self._source.seed or 0, "blocks": None}

    def quantized_folder(self) -> Path:
        return self.folder

    def qdq_file(self) -> Path:
        path = self.folder / QDQ_FILE
        if not path.is_file():
            raise InputError(f"no {QDQ_FILE} in {self.folder}; run qdit-export to its end first")
        return path

    def inputs(self, batch: int) -> dict[str, np.ndarray]:
        return self._outline.inputs(batch)

    def release(self) -> None:
        self._model = None


class _Outline:
    """A denoiser without weights: enough to make inputs for it."""

    def __init__(self, family: Family, config: dict[str, Any], seed: int) -> None:
        with torch.device("meta"):
            self._denoiser = family.build(config)
        self._family = family
        self._seed = seed

    def inputs(self, batch: int) -> dict[str, np.ndarray]:
        generator = torch.Generator().manual_seed(self._seed)
        names = (spec.name for spec in self._family.inputs(self._denoiser))
        values = self._family.example_inputs(self._denoiser, batch, generator)
        return {name: value.numpy() for name, value in zip(names, values, strict=True)}


def _plan_facts(plan: QuantizationPlan, effective_weight_bits: float) -> dict[str, Any]:
    return {
        "bits": plan.bits,
        "schemes": sorted({scheme.label for scheme in plan.layers.values()}),
        "effective_weight_bits": effective_weight_bits,
    }
