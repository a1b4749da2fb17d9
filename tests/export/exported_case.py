"""An exported file beside what it was made from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import onnx

from qdit.calibrate.checkpoint import QuantizedCheckpoint
from qdit.calibrate.model import DiffusionModel
from qdit.export.write import ExportedModel


@dataclass(frozen=True)
class Case:
    """One exported model and what it was made from."""

    model: DiffusionModel
    checkpoint: QuantizedCheckpoint
    exported: ExportedModel

    @property
    def path(self) -> Path:
        return self.exported.path

    def linears(self) -> dict[str, dict[str, object]]:
        metadata = onnx.load(self.path, load_external_data=False).metadata_props
        (entry,) = (e.value for e in metadata if e.key == "qdit.linears")
        found: dict[str, dict[str, object]] = json.loads(entry)
        return found
