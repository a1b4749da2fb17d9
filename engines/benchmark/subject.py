"""What is benchmarked, as the targets' parent side sees it (`subjects.py` has the kinds)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...calibrate.model import DiffusionModel


class Subject(Protocol):
    """Files and models for the targets' `prepare`, made on demand and once.

    Ask for what is full precision before what is quantized: quantizing works in place, and the
    model would have to be loaded again.
    """

    def facts(self) -> dict[str, Any]:
        """JSON values for the results: source, model name, bits, layer scheme, blocks, seed."""

    def full_precision(self) -> DiffusionModel:
        """The full-precision model. `InputError` where it cannot be loaded."""

    def full_precision_arguments(self) -> dict[str, Any]:
        """Keyword arguments with which a worker's `load_model` loads the same model."""

    def quantized_folder(self) -> Path:
        """The quantized checkpoint's folder."""

    def qdq_file(self) -> Path:
        """The standard ONNX file of the quantized model."""

    def inputs(self, batch: int) -> dict[str, np.ndarray]:
        """Random inputs of the denoiser, batch first, equal in every call of one seed."""

    def release(self) -> None:
        """Drop loaded models: the targets' turns need the memory."""
