"""Finished blocks on disk: a killed quantization goes on where it was.

One safetensors file a block, written atomically: `<linear>.values`, `.scale`, `.zero_point` and
`.multiplier`, with the run's key, the bits and the errors in its metadata. A file of another key,
or one that cannot be read, counts as not there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import atomic_path
from .quantizers import QuantizedWeight


@dataclass(frozen=True)
class LayerError:
    """How far a quantized linear is from the original.

    weight: ‖W−Ŵ‖ / ‖W‖ (Frobenius). output: ‖(W−Ŵ)X‖ / ‖WX‖ over the calibration inputs X as the
    quantized layer sees them, from their Hessian; None when no inputs were run. float_scales: for
    a linear with integer scales, the errors that float scales of the same groups would have given
    it; None where they were not asked for.
    """

    weight: float
    output: float | None
    float_scales: LayerError | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields by name, without `float_scales` where there are none."""
        value: dict[str, Any] = {"weight": self.weight, "output": self.output}
        if self.float_scales is not None:
            value["float_scales"] = self.float_scales.to_json()
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> LayerError:
        """The inverse of `to_json`. Raises `KeyError` or `TypeError` for anything else."""
        other = value.get("float_scales")
        return cls(
            value["weight"], value["output"], None if other is None else cls.from_json(other)
        )


@dataclass(frozen=True)
class BlockResult:
    """One block's quantized weights and errors, by linear name."""

    weights: dict[str, QuantizedWeight]
    errors: dict[str, LayerError]


class BlockStore:
    """Block results under `folder`, valid for `key` alone."""

    def __init__(self, folder: Path, key: str) -> None:
        self._folder = folder
        self._key = key

    def _path(self, block: int) -> Path:
        return self._folder / f"block-{block:04d}.safetensors"

    def read(self, block: int) -> BlockResult | None:
        """The block's result, or None if it is not there, unreadable or of another key."""
        try:
            with safe_open(self._path(block), framework="pt") as file:
                metadata: dict[str, str] = file.metadata() or {}
                if metadata.get("key") != self._key:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return _result(tensors, json.loads(metadata["layers"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def write(self, block: int, result: BlockResult) -> None:
        """Store one finished block."""
        tensors = {}
        for name, weight in result.weights.items():
            for part, tensor in weight.tensors().items():
                tensors[f"{name}.{part}"] = tensor.contiguous()
        layers = {
            name: {"bits": weight.bits, "error": result.errors[name].to_json()}
            for name, weight in result.weights.items()
        }
        metadata = {"key": self._key, "layers": json.dumps(layers)}  # in model order
        with atomic_path(self._path(block)) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    def finished(self, blocks: int) -> list[BlockResult]:
        """The results of the leading blocks that are all there."""
        results = []
        for block in range(blocks):
            result = self.read(block)
            if result is None:
                break
            results.append(result)
        return results


def _result(tensors: dict[str, Tensor], layers: dict[str, Any]) -> BlockResult:
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
    for label, tensor in tensors.items():
        name, _, part = label.rpartition(".")
        parts[name][part] = tensor
    weights = {name: QuantizedWeight.of(parts[name], layers[name]["bits"]) for name in layers}
    errors = {name: LayerError.from_json(layer["error"]) for name, layer in layers.items()}
    return BlockResult(weights, errors)
