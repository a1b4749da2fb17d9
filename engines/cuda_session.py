"""What ONNX Runtime's CUDA provider needs beside a session: its libraries, and captured graphs."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime

from .engine import Arrays, TensorSpec

GRAPH_OPTION = "enable_cuda_graph"
_GRAPH_ID = "gpu_graph_id"


def load_cuda_libraries() -> None:
    """Load CUDA from the `nvidia-…` wheels that pip installs beside ONNX Runtime, where they are.

    ONNX Runtime does not look there by itself, and `onnxruntime-gpu[cuda]` and torch put them
    nowhere else. What it prints of those it did not find is dropped: a provider that does not start
    is reported as such.
    """
    preload = getattr(onnxruntime, "preload_dlls", None)  # ONNX Runtime 1.21 and newer
    if preload is None:
        return
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
        preload()


def wants_graphs(options: Mapping[str, str]) -> bool:
    """Whether these provider options ask for CUDA graphs."""
    return options.get(GRAPH_OPTION, "0").lower() in ("1", "true")


class GraphRunner:
    """Runs a session whose provider captures CUDA graphs: one launch a call for all its kernels.

    A graph reads and writes fixed addresses, so inputs and outputs of each shape stay on the
    `device`, 'cuda' or 'cpu' as ONNX Runtime calls them, and are copied in and out. Each shape is
    captured in its first call, and takes memory of its own from then on.
    """

    def __init__(
        self,
        session: Any,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        device: str = "cuda",
    ) -> None:
        self._session, self._device = session, device
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)
        self._bound: dict[tuple[tuple[int, ...], ...], _Bound] = {}

    def run(self, names: Sequence[str], inputs: Arrays) -> dict[str, np.ndarray]:
        """All outputs by name, as `InferenceSession.run` returns them."""
        key = tuple(inputs[spec.name].shape for spec in self._inputs)
        if key not in self._bound:
            self._bound[key] = self._bind(inputs, len(self._bound) + 1)
        return self._bound[key].run(names, inputs)

    def _bind(self, inputs: Arrays, graph: int) -> _Bound:
        sizes = {
            dim: size
            for spec in self._inputs
            for dim, size in zip(spec.shape, inputs[spec.name].shape, strict=True)
        }
        given = {
            spec.name: onnxruntime.OrtValue.ortvalue_from_numpy(
                np.ascontiguousarray(inputs[spec.name]), self._device, 0
            )
            for spec in self._inputs
        }
        made = {
            spec.name: onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                [dim if isinstance(dim, int) else sizes[dim] for dim in spec.shape],
                spec.dtype,
                self._device,
                0,
            )
            for spec in self._outputs
        }
        binding = self._session.io_binding()
        for name, value in given.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in made.items():
            binding.bind_ortvalue_output(name, value)
        options = onnxruntime.RunOptions()
        options.add_run_config_entry(_GRAPH_ID, str(graph))
        return _Bound(self._session, binding, options, given, made)


class _Bound:
    """Inputs and outputs of one shape on the device, and the graph that reads and writes them."""

    def __init__(
        self, session: Any, binding: Any, options: Any, given: dict[str, Any], made: dict[str, Any]
    ) -> None:
        self._session, self._binding, self._options = session, binding, options
        self._given, self._made = given, made

    def run(self, names: Sequence[str], inputs: Arrays) -> dict[str, np.ndarray]:
        for name, value in self._given.items():
            value.update_inplace(np.ascontiguousarray(inputs[name]))
        self._session.run_with_iobinding(self._binding, self._options)
        # a copy of its own: on a CPU numpy() is the bound memory itself, which the next run writes
        return {name: np.array(self._made[name].numpy()) for name in names}
