"""Load compiled kernels into torch's CUDA context and launch them on torch's streams."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError, StepError
from .compile import Defines, compile_kernel

# One of a kernel's arguments: a device pointer (None is a null pointer), int32 or float32.
Argument = Tensor | None | int | float


@dataclass(frozen=True)
class Gpu:
    """What a kernel is compiled and tuned for. `architecture` as NVRTC spells it."""

    index: int
    name: str
    architecture: str
    multiprocessors: int
    shared_bytes: int

    @property
    def dependent_launch(self) -> bool:
        return int(self.architecture[3:].rstrip("a")) >= 90

    @property
    def hopper(self) -> bool:
        """Whether warpgroup instructions exist: compute capability 9.0 and no other has them."""
        return self.architecture == "sm_90a"


@cache
def gpu(index: int) -> Gpu:
    """The CUDA device `index`. Raises `InputError` below compute capability 8.0."""
    facts: Any = torch.cuda.get_device_properties(index)
    return make_gpu(
        index,
        facts.name,
        (facts.major, facts.minor),
        facts.multi_processor_count,
        facts.shared_memory_per_block_optin,
    )


def make_gpu(
    index: int, name: str, capability: tuple[int, int], multiprocessors: int, shared_bytes: int
) -> Gpu:
    """A device by its facts. Raises `InputError` below compute capability 8.0."""
    major, minor = capability
    if major < 8:
        raise InputError(
            f"the kernels need compute capability 8.0 or newer, {name} has {major}.{minor}; use "
            "another GPU or --device cpu"
        )
    suffix = "a" if capability == (9, 0) else ""
    return Gpu(index, name, f"sm_{major}{minor}{suffix}", multiprocessors, shared_bytes)


def gpu_of(tensor: Tensor) -> Gpu:
    """The device that holds a tensor. Raises `InputError` for one that is not on CUDA."""
    if not tensor.is_cuda:
        raise InputError(f"the kernels run on CUDA tensors, got one on {tensor.device}")
    return gpu(tensor.device.index)


class Kernel:
    """A loaded kernel: `launch` enqueues it on the current stream.

    dependent: it may start its preamble while the stream's last kernel still runs, and waits for
    that one itself (programmatic dependent launch, Hopper and later).
    """

    def __init__(self, code: bytes, name: str, shared_bytes: int, *, dependent: bool) -> None:
        driver = _driver()
        self._driver = driver
        self._module = _checked(driver, driver.cuModuleLoadData(code))
        self._function = _checked(driver, driver.cuModuleGetFunction(self._module, name.encode()))
        self._shared_bytes = shared_bytes
        self._attributes = [_dependent_launch(driver)] if dependent else []
        if shared_bytes > _SHARED_WITHOUT_ASKING:
            attribute = driver.CUfunction_attribute
            _checked(
                driver,
                driver.cuFuncSetAttribute(
                    self._function,
                    attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    shared_bytes,
                ),
            )

    def launch(self, grid: tuple[int, int], threads: int, arguments: Sequence[Argument]) -> None:
        """Run on `grid` blocks. Arguments in the kernel's order; nothing is checked against it."""
        values, types = zip(*(_marshalled(argument) for argument in arguments), strict=True)
        driver = self._driver
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = *grid, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = self._shared_bytes
        config.hStream = torch.cuda.current_stream().cuda_stream
        config.attrs, config.numAttrs = self._attributes, len(self._attributes)
        _checked(driver, driver.cuLaunchKernelEx(config, self._function, (values, types), 0))


def load_kernel(file: str, name: str, defines: Defines, shared_bytes: int, device: Gpu) -> Kernel:
    """The kernel `name` of `file` for this GPU, compiled unless it is in the cache."""
    return _load(file, name, tuple(sorted(defines.items())), shared_bytes, device)


@cache
def _load(
    file: str, name: str, defines: tuple[tuple[str, int], ...], shared_bytes: int, device: Gpu
) -> Kernel:
    torch.cuda.init()
    code = compile_kernel(file, dict(defines), device.architecture)
    with torch.cuda.device(device.index):
        _make_current(device.index)
        return Kernel(code, name, shared_bytes, dependent=device.dependent_launch)


def _make_current(index: int) -> None:
    """Make the context that torch works in, the device's primary one, this thread's as well.

    A thread that torch has not served yet has none, and modules load into the current one.
    """
    driver = _driver()
    context = _checked(driver, driver.cuDevicePrimaryCtxRetain(index))
    _checked(driver, driver.cuCtxSetCurrent(context))


_SHARED_WITHOUT_ASKING = 48 << 10


def _dependent_launch(driver: Any) -> Any:
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return attribute


def _marshalled(argument: Argument) -> tuple[int | float, Any]:
    if argument is None:
        return 0, ctypes.c_void_p
    if isinstance(argument, Tensor):
        return argument.data_ptr(), ctypes.c_void_p
    if isinstance(argument, float):
        return argument, ctypes.c_float
    return argument, ctypes.c_int32


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise InputError(
            "the CUDA kernels need cuda-bindings; install them with `pip install 'qdit[gpu]'`"
        ) from error
    return driver


def _checked(driver: Any, result: tuple[Any, ...]) -> Any:
    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        raise StepError(f"the CUDA driver failed: {status.name}")
    return values[0] if values else None
