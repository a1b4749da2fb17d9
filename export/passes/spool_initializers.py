"""Write large initializers to a file, each distinct one once, holding one in memory at a time."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from ...progress import Progress, Silent

# Smaller tensors stay in the model: shape inference must see the shapes among them.
SMALLEST_SPOOLED = 1024
# The allocation granularity of memory mapping on every common system divides into it.
ALIGNMENT = 4096


class SpoolInitializersPass(ir.passes.InPlacePass):
    """Move initializers into the file at `path` and merge the identical ones.

    Requires: initializers that evaluate to their declared dtype and shape.
    Ensures: equal outputs; the bytes of the file depend on the initializers only. Cases:

    1. `SMALLEST_SPOOLED` bytes or more → an `ir.ExternalTensor` of the file, at an offset that is
       a multiple of `ALIGNMENT`.
    2. Equal dtype, shape and bytes as an earlier initializer → that one is used, this one goes.
    3. Kept in the model: smaller initializers, evaluated.
    4. Kept although equal: an initializer that is a graph output itself.
    """

    def __init__(self, path: Path, progress: Progress | None = None) -> None:
        super().__init__()
        self.path = path
        self.progress = progress or Silent()
        self.byte_size = 0

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        values = list(graph.initializers.values())
        first: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        modified = False
        with self.path.open("wb") as file:
            for value in self.progress.track(values, "writing ONNX weights", len(values)):
                tensor = value.const_value
                if tensor is None:
                    raise ValueError(f"initializer {value.name} has no data")
                data = _bytes_of(tensor, str(value.name))
                key = (str(tensor.dtype), _sizes(tensor), _digest(data))
                earlier = first.setdefault(key, value)
                if earlier is not value and not value.is_graph_output():
                    ir.convenience.replace_all_uses_with(value, earlier)
                    del graph.initializers[str(value.name)]
                    modified = True
                elif len(data) >= SMALLEST_SPOOLED:
                    value.const_value = self._append(file, value, tensor, data)
                    modified = True
                else:
                    value.const_value = _in_memory(tensor, data, str(value.name))
            self.byte_size = file.tell()
        return ir.passes.PassResult(model, modified)

    def _append(
        self, file: BinaryIO, value: ir.Value, tensor: ir.TensorProtocol, data: bytes
    ) -> ir.ExternalTensor:
        file.write(b"\0" * (-file.tell() % ALIGNMENT))
        offset = file.tell()
        file.write(data)
        return ir.ExternalTensor(
            self.path.name,
            offset,
            len(data),
            tensor.dtype,
            shape=ir.Shape(_sizes(tensor)),
            name=str(value.name),
            base_dir=self.path.parent,
        )


def _bytes_of(tensor: ir.TensorProtocol, name: str) -> bytes:
    """The tensor's raw bytes, checked against what it declares."""
    evaluated = tensor.raw() if isinstance(tensor, ir.LazyTensor) else tensor
    if evaluated.dtype != tensor.dtype or _sizes(evaluated) != _sizes(tensor):
        raise ValueError(
            f"initializer {name} must be {tensor.dtype} {tensor.shape}, "
            f"got {evaluated.dtype} {evaluated.shape}"
        )
    return evaluated.tobytes()


def _in_memory(tensor: ir.TensorProtocol, data: bytes, name: str) -> ir.TensorProtocol:
    if tensor.dtype.bitwidth < 8:
        packed = np.frombuffer(data, np.uint8)
        return ir.PackedTensor(packed, tensor.dtype, shape=ir.Shape(_sizes(tensor)), name=name)
    array = np.frombuffer(data, tensor.dtype.numpy()).reshape(_sizes(tensor))
    return ir.Tensor(array, tensor.dtype, name=name)


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _sizes(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """The shape of a tensor with data: its dimensions are all known."""
    return tuple(dim for dim in tensor.shape if isinstance(dim, int))
