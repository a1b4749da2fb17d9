"""Device memory and graphs through CUDA's runtime API: no torch is needed to run an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ...errors import InputError, StepError


def cuda_runtime() -> Any:
    """`cuda.bindings.runtime`. Raises `InputError` where it is not installed."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise InputError(
            f"TensorRT engines are run with cuda-bindings, which is not installed here ({error}); "
            "install it with `pip install 'qdit[tensorrt]'`"
        ) from error
    return runtime


def checked(runtime: Any, result: tuple[Any, ...]) -> Any:
    """A CUDA call's value. Raises `StepError` with the error's name."""
    status, *values = result
    if status != runtime.cudaError_t.cudaSuccess:
        raise StepError(f"CUDA failed: {status.name}")
    return values[0] if values else None


class DeviceBuffer:
    """Memory on the GPU that grows when more is asked for."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self.pointer = 0
        self.byte_size = 0

    def reserve(self, byte_size: int) -> bool:
        """Make room; True when the memory moved."""
        if byte_size <= self.byte_size:
            return False
        self.free()
        self.pointer = int(checked(self._runtime, self._runtime.cudaMalloc(byte_size)))
        self.byte_size = byte_size
        return True

    def upload(self, array: np.ndarray, stream: int) -> None:
        """Copy from the host; the array must live until the stream is synchronized."""
        self._copy(self.pointer, array.ctypes.data, array.nbytes, stream, "HostToDevice")

    def download(self, array: np.ndarray, stream: int) -> None:
        """Copy to the host; the array is filled once the stream is synchronized."""
        self._copy(array.ctypes.data, self.pointer, array.nbytes, stream, "DeviceToHost")

    def _copy(self, to: int, source: int, byte_size: int, stream: int, kind: str) -> None:
        kinds = self._runtime.cudaMemcpyKind
        direction = getattr(kinds, f"cudaMemcpy{kind}")
        copied = self._runtime.cudaMemcpyAsync(to, source, byte_size, direction, stream)
        checked(self._runtime, copied)

    def free(self) -> None:
        if self.pointer:
            checked(self._runtime, self._runtime.cudaFree(self.pointer))
            self.pointer = self.byte_size = 0


class NotCapturedError(StepError):
    """What was launched cannot be captured into a graph."""


@contextmanager
def captured(runtime: Any, stream: int, launch: Callable[[], None]) -> Iterator[Any]:
    """The graph of what `launch()` enqueues on `stream`, for as long as the context lasts.

    Nothing of it is executed. Raises `NotCapturedError` where `launch` or the runtime fails.
    """
    mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    checked(runtime, runtime.cudaStreamBeginCapture(stream, mode))
    try:
        try:
            launch()
        finally:  # or the stream stays in capture
            ended = runtime.cudaStreamEndCapture(stream)
        graph = checked(runtime, ended)
    except StepError as error:
        raise NotCapturedError(str(error)) from error
    try:
        yield graph
    finally:
        checked(runtime, runtime.cudaGraphDestroy(graph))


class Graph:
    """A captured sequence of launches, replayed as one."""

    def __init__(self, runtime: Any, executable: Any) -> None:
        self._runtime = runtime
        self._executable = executable

    @classmethod
    def capture(cls, runtime: Any, stream: int, launch: Callable[[], None]) -> Graph | None:
        """Capture what `launch()` enqueues on `stream`; None where that cannot be captured."""
        try:
            with captured(runtime, stream, launch) as graph:
                return cls(runtime, checked(runtime, runtime.cudaGraphInstantiate(graph, 0)))
        except NotCapturedError:
            return None

    def launch(self, stream: int) -> None:
        checked(self._runtime, self._runtime.cudaGraphLaunch(self._executable, stream))

    def free(self) -> None:
        checked(self._runtime, self._runtime.cudaGraphExecDestroy(self._executable))
