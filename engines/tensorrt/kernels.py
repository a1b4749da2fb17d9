"""The names of the kernels that an engine launches, and which of them are matrix products.

One execution is captured into a CUDA graph, and the driver says which function each node calls: it
needs no counters of the GPU, whose use many machines deny, and sees inside what the engine
inspector hides. Kernels that TensorRT launches outside its stream are not in a capture.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ...errors import InputError, StepError
from .cuda import captured

# Names seen in engines of 8.6 on an H200: xmma's products, by the types of operands, accumulators
# and results ('i8i8_i8i32_f32', 'f16f16_f16f32_f32', 'f32f32_f32f32_f32'), and Myelin's fused
# attention. The mma shapes are those of INT8 in the CUTLASS kernels of other GPUs.
_PRODUCT = re.compile(r"gemm|fprop|cublas|cutlass|i8816|i16832|imma", re.IGNORECASE)
_INTEGER = re.compile(r"i8i8_i8i32|i8f32_i8i32|i8816|i16832|imma", re.IGNORECASE)
_ATTENTION = re.compile(r"^_*f?mha", re.IGNORECASE)
# the second launch of a product that was split along K
_SECOND = re.compile(r"split_k_kernel|splitkreduce", re.IGNORECASE)


def cuda_driver() -> Any:
    """`cuda.bindings.driver`. Raises `InputError` where it is not installed."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise InputError(
            f"kernels are named by cuda-bindings, which is not installed here ({error}); install "
            "it with `pip install 'qdit[tensorrt]'`"
        ) from error
    return driver


def launched_kernels(runtime: Any, stream: int, launch: Callable[[], None]) -> dict[str, int]:
    """Launches by kernel name of what `launch()` enqueues on `stream`, which is not executed.

    It must have been executed before: TensorRT sets things up in a first run that cannot be
    captured. Raises `StepError` where the driver refuses, `InputError` without cuda-bindings.
    """
    driver = cuda_driver()
    with captured(runtime, stream, launch) as graph:
        return dict(Counter(_names(driver, graph)).most_common())


def integer_products(kernels: Mapping[str, int]) -> int:
    """Launches of INT8 matrix products, by their names."""
    return sum(count for name, count in kernels.items() if _is_product(name) and _is_integer(name))


def float_products(kernels: Mapping[str, int]) -> int:
    """Matrix products in floating point, by their names; fused attention has two of them."""
    plain = sum(
        count for name, count in kernels.items() if _is_product(name) and not _is_integer(name)
    )
    return plain + 2 * sum(count for name, count in kernels.items() if _ATTENTION.search(name))


def _is_product(name: str) -> bool:
    return bool(_PRODUCT.search(name)) and not _SECOND.search(name) and not _ATTENTION.search(name)


def _is_integer(name: str) -> bool:
    return bool(_INTEGER.search(name))


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
