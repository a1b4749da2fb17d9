"""The names of the kernels that a TensorRT engine launches, without a profiler.

One execution is captured into a CUDA graph, and the driver says which function each node calls: it
needs no counters of the GPU, whose use many machines deny, and sees inside what the engine
inspector hides. Kernels that TensorRT launches outside its stream are not in a capture.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from qdit.engines.tensorrt.cuda import checked, cuda_runtime
from qdit.engines.tensorrt.engine import TensorRtEngine
from qdit.errors import StepError

# What kernels for INT8 matrix units are called: mma shapes of Turing and Ampere, CUTLASS's and
# xmma's operand types. A name is a hint; `ncu` counts the instructions themselves.
_INT8 = re.compile(r"i8816|i16832|i8i8|int8|imma|igemm|_i8|s8_|_s8", re.IGNORECASE)


def kernels_of(engine: TensorRtEngine) -> dict[str, int]:
    """Launches by kernel name, of one execution on the inputs that are bound.

    engine: opened with `graphs=False`, its inputs bound (`bind`), and run at least once: TensorRT
    sets things up in a first run that cannot be captured. Raises `StepError` where the driver
    refuses.
    """
    from cuda.bindings import driver

    runtime = cuda_runtime()
    mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    checked(runtime, runtime.cudaStreamBeginCapture(engine._stream, mode))
    try:
        engine._enqueue(engine._context, engine._stream)
    finally:  # or the stream stays in capture
        ended = runtime.cudaStreamEndCapture(engine._stream)
    graph = checked(runtime, ended)
    try:
        return dict(Counter(_names(driver, graph)).most_common())
    finally:
        checked(runtime, runtime.cudaGraphDestroy(graph))


def count_int8(names: Iterable[str]) -> int:
    """How many of the names are those of INT8 kernels."""
    return sum(bool(_INT8.search(name)) for name in names)


def _names(driver: Any, graph: Any) -> Iterator[str]:
    _, count = _asked(driver, driver.cuGraphGetNodes(graph))
    nodes, _ = _asked(driver, driver.cuGraphGetNodes(graph, count))
    kinds = driver.CUgraphNodeType
    for node in nodes:
        (kind,) = _asked(driver, driver.cuGraphNodeGetType(node))
        if kind == kinds.CU_GRAPH_NODE_TYPE_GRAPH:
            (child,) = _asked(driver, driver.cuGraphChildGraphNodeGetGraph(node))
            yield from _names(driver, child)
        elif kind == kinds.CU_GRAPH_NODE_TYPE_KERNEL:
            (launch,) = _asked(driver, driver.cuGraphKernelNodeGetParams(node))
            by_function = int(launch.func) != 0  # else it was launched as a library's kernel
            asked = (
                driver.cuFuncGetName(launch.func)
                if by_function
                else driver.cuKernelGetName(launch.kern)
            )
            (name,) = _asked(driver, asked)
            yield name.decode() if isinstance(name, bytes) else str(name)


def _asked(driver: Any, result: tuple[Any, ...]) -> tuple[Any, ...]:
    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        raise StepError(f"the CUDA driver failed: {status.name}")
    return tuple(values)
