"""Finished blocks on disk: a killed quantization goes on where it was.

One safetensors file a block, written atomically: `<linear>.values`, `.scale` and `.zero_point`,
with the run's key, the bits and the errors in its metadata. A file of another key, or one that
cannot be read, counts as not there.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..files import atomic_path
from .quantizers import QuantizedWeight


@dataclass(frozen=True)
class LayerError:
    """How far a quantized linear is from the original.

    weight: ‖W−Ŵ‖ / ‖W‖ (Frobenius). output: ‖(W−Ŵ)X‖ / ‖WX‖ over the calibration inputs X as the
    quantized layer sees them, from their Hessian; None when no inputs were run.
    """

    weight: float
    output: float | None


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
            tensors[f"{name}.values"] = weight.values.contiguous()
            tensors[f"{name}.scale"] = weight.scale.contiguous()
            if weight.zero_point is not None:
                tensors[f"{name}.zero_point"] = weight.zero_point.contiguous()
        layers = {
            name: {"bits": weight.bits, "error": asdict(result.errors[name])}
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


def _result(tensors: dict[str, Any], layers: dict[str, Any]) -> BlockResult:
    weights = {
        name: QuantizedWeight(
            tensors[f"{name}.values"],
            tensors[f"{name}.scale"],
            tensors.get(f"{name}.zero_point"),
            layer["bits"],
        )
        for name, layer in layers.items()
    }
    errors = {name: LayerError(**layer["error"]) for name, layer in layers.items()}
    return BlockResult(weights, errors)
