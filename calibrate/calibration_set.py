"""The calibration set as data: denoiser inputs (x_t, t, y), saved as one safetensors file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ArtifactError, InputError
from ..files import atomic_path

_DTYPES = {
    "hidden_states": torch.float32,
    "timestep": torch.int64,
    "class_labels": torch.int64,
}


@dataclass(frozen=True)
class CalibrationSet:
    """S denoiser inputs: hidden_states float32 [S, C, H, W], timestep int64 [S] (original 0 … 999
    index), class_labels int64 [S]. Raises `InputError` for other dtypes or lengths."""

    hidden_states: Tensor
    timestep: Tensor
    class_labels: Tensor

    def __post_init__(self) -> None:
        for (name, dtype), tensor in zip(_DTYPES.items(), self.tensors, strict=True):
            if tensor.dtype != dtype:
                raise InputError(f"calibration {name} must be {dtype}, got {tensor.dtype}")
            dimensions = 4 if name == "hidden_states" else 1
            if tensor.ndim != dimensions or len(tensor) != len(self.hidden_states):
                raise InputError(
                    f"calibration {name} must have {dimensions} dimensions and "
                    f"{len(self.hidden_states)} samples, got shape {list(tensor.shape)}"
                )
        if len(self) == 0:
            raise InputError("a calibration set needs at least one sample, got 0")

    def __len__(self) -> int:
        return len(self.hidden_states)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The inputs in the order of `Family.forward`."""
        return self.hidden_states, self.timestep, self.class_labels

    @cached_property
    def digest(self) -> str:
        """SHA-256 over shapes and values."""
        total = hashlib.sha256()
        for tensor in self.tensors:
            total.update(str(tuple(tensor.shape)).encode())
            total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return total.hexdigest()

    def batches(self, size: int) -> Iterator[CalibrationSet]:
        """The set in order, in parts of `size` samples; the last may be smaller."""
        if size < 1:
            raise InputError(f"the calibration batch size must be at least 1, got {size}")
        for parts in zip(*(tensor.split(size) for tensor in self.tensors), strict=True):
            yield CalibrationSet(*parts)

    @classmethod
    def concatenate(cls, sets: Sequence[CalibrationSet]) -> CalibrationSet:
        """One set of all samples, in order."""
        columns = zip(*(part.tensors for part in sets), strict=True)
        return cls(*(torch.cat(column) for column in columns))

    def write(self, path: Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write atomically; `metadata` lands in the file's header."""
        tensors = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in zip(_DTYPES, self.tensors, strict=True)
        }
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata=dict(metadata or {}))

    @classmethod
    def read(cls, path: Path) -> CalibrationSet:
        """Read what `write` wrote. Raises `ArtifactError` for anything else."""
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                if names != set(_DTYPES):
                    raise ArtifactError(
                        f"a calibration set holds {', '.join(_DTYPES)}, got "
                        f"{', '.join(sorted(names)) or 'nothing'} in {path}; collect it again"
                    )
                return cls(*(file.get_tensor(name) for name in _DTYPES))
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{path} is no readable calibration set: {error}") from error
        except InputError as error:
            raise ArtifactError(f"{path}: {error}; collect it again") from error


def metadata_of(path: Path) -> dict[str, str]:
    """The header's metadata; empty when the file is missing or unreadable."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return {}
