"""The two files for ONNX Runtime, and what differs between them: provider, dtype and export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ...errors import InputError
from ...export.onnxruntime.files import export_onnxruntime, export_onnxruntime_cuda
from ...export.opsets import ComputeDtype
from ...export.write import ExportedModel
from ...onnx_places import ONNXRUNTIME_CUDA_FILE, ONNXRUNTIME_FILE
from ..session_settings import CPU, CUDA


@dataclass(frozen=True)
class OnnxRuntimeFile:
    """A target's file for ONNX Runtime.

    `file`: where an export's folder holds it (`onnx_places`); `dtype`: what it computes in;
    `provider`: the one whose operators it is written in; `exported`: the export, called with
    checkpoint and path.
    """

    target: str
    file: str
    dtype: ComputeDtype
    provider: str
    exported: Callable[..., ExportedModel]

    def path(self, folder: Path) -> Path:
        return folder / self.file

    def existing(self, folder: Path) -> Path:
        """Its path in `folder`. Raises `InputError` where it is not there."""
        path = self.path(folder)
        if not path.is_file():
            raise InputError(
                f"{folder} holds no {self.file}; export it again with --target {self.target}"
            )
        return path


ON_CPU = OnnxRuntimeFile("onnxruntime", ONNXRUNTIME_FILE, "float32", CPU, export_onnxruntime)
ON_CUDA = OnnxRuntimeFile(
    "onnxruntime-cuda", ONNXRUNTIME_CUDA_FILE, "float16", CUDA, export_onnxruntime_cuda
)

ONNXRUNTIME_FILES: Mapping[str, OnnxRuntimeFile] = MappingProxyType(
    {file.target: file for file in (ON_CPU, ON_CUDA)}
)


def file_for(provider: str) -> OnnxRuntimeFile:
    """The file to run by `provider`: the CUDA provider has its own, the CPU's serves all others."""
    return ON_CUDA if provider == CUDA else ON_CPU
