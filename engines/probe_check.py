"""A stored probe of an exported file: inputs, what comes out of them, and how far off it may be.

Runtimes have had faults that give wrong numbers and no error (docs/onnxruntime.md names some). An
engine that finds a probe beside its file runs it once as it loads, and refuses a session whose
numbers are off.

The file is `<model>.probe.safetensors`: tensors 'input/<name>' and 'output/<name>', and in its
metadata the tolerance, a relative error ‖made − stored‖ / ‖stored‖ (`targets/probe.py` derives it).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import ArtifactError, StepError
from ..files import atomic_path

SUFFIX = ".probe.safetensors"
_FORMAT = "1"
_INPUT, _OUTPUT = "input/", "output/"

Array = NDArray[np.generic]


class SelfTestError(StepError):
    """A session computes a file wrong: another engine, version or provider may do better."""


@dataclass(frozen=True)
class Probe:
    """Inputs by name, the outputs of the simulation by name, and the relative error allowed."""

    inputs: dict[str, Array]
    outputs: dict[str, Array]
    tolerance: float

    def error_of(self, made: dict[str, Array]) -> float:
        """The largest relative error of an output; infinity where one is missing or not finite."""
        return max(_relative_error(made.get(name), wanted) for name, wanted in self.outputs.items())

    def write(self, path: Path) -> None:
        """Write the probe's file, atomically."""
        from safetensors.numpy import save

        tensors = {f"{_INPUT}{name}": array for name, array in self.inputs.items()}
        tensors |= {f"{_OUTPUT}{name}": array for name, array in self.outputs.items()}
        metadata = {"format": _FORMAT, "tolerance": repr(self.tolerance)}
        with atomic_path(path) as temporary:
            arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
            temporary.write_bytes(save(arrays, metadata))


def probe_path(model: Path) -> Path:
    """Where the probe of a model file lies: model.onnx → model.probe.safetensors."""
    return model.with_suffix(SUFFIX)


def read_probe(model: Path) -> Probe | None:
    """The probe beside a model file, None where there is none. `ArtifactError` when damaged."""
    path = probe_path(model)
    if not path.is_file():
        return None
    from safetensors import safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata["format"] != _FORMAT:
            raise ValueError(f"its format is {metadata['format']}, not {_FORMAT}")
        tolerance = float(metadata["tolerance"])
        if not 0 < tolerance < 1:
            raise ValueError(f"its tolerance is {tolerance}")
        probe = Probe(_part(arrays, _INPUT), _part(arrays, _OUTPUT), tolerance)
        if not probe.inputs or not probe.outputs:
            raise ValueError("it has no inputs or no outputs")
    except Exception as error:  # safetensors raises a kind of its own
        raise ArtifactError(
            f"{path} is not a probe of this version of qdit ({error}); export the model again, or "
            "delete it to go without a self-test"
        ) from error
    return probe


def _part(arrays: dict[str, Array], prefix: str) -> dict[str, Array]:
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }


def _relative_error(made: Array | None, wanted: Array) -> float:
    if made is None or made.shape != wanted.shape:
        return math.inf
    difference = made.astype(np.float64) - wanted.astype(np.float64)
    error = float(np.linalg.norm(difference) / np.linalg.norm(wanted.astype(np.float64)))
    return error if math.isfinite(error) else math.inf
