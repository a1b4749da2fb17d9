"""Launches without a GPU: what goes to the driver is held against the kernels' own signatures."""

# ruff: noqa: N802 - the recorder has the methods of the driver, by their names

from __future__ import annotations

import contextlib
import ctypes
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda.bindings import driver as real_driver

from qdit.calibrate.schemes import LayerScheme
from qdit.engines.kernels import driver, product, rows, weight_only
from qdit.engines.kernels.driver import Gpu
from qdit.engines.kernels.operands import Gate, Modulation
from qdit.engines.kernels.product import linear
from qdit.engines.kernels.rows import quantize_rows
from qdit.engines.kernels.sources import source
from qdit.engines.kernels.variants import (
    QuantizeKind,
    Tile,
    WeightOnlyKind,
    linear_shared_bytes,
)
from qdit.engines.kernels.weight_only import weight_only_linear
from qdit.errors import InputError, StepError

from .conftest import SCHEMES, make_problem

SUCCESS = real_driver.CUresult.CUDA_SUCCESS
H100 = Gpu(0, "NVIDIA H100", "sm_90a", 132, 227 << 10)
A100 = Gpu(0, "NVIDIA A100", "sm_80", 108, 163 << 10)


def signature(file: str) -> list[type]:
    """The ctypes of a kernel's parameters, read from its source."""
    text = source(file)
    start = text.index('extern "C" __global__')
    parameters = re.search(r"qdit_\w+\((.*?)\)\s*\{", text[start:], re.DOTALL)
    assert parameters is not None
    kinds = {"*": ctypes.c_void_p, "float ": ctypes.c_float, "int ": ctypes.c_int32}
    return [
        next(kind for word, kind in kinds.items() if word in parameter)
        for parameter in parameters[1].split(",")
    ]


class Recorder:
    """The driver, with every call that would need a GPU recorded instead."""

    def __init__(self) -> None:
        self.launches: list[Any] = []
        self.shared_bytes: list[int] = []
        self.current: dict[int, str] = {}  # contexts by thread
        self.status = SUCCESS

    def __getattr__(self, name: str) -> Any:
        return getattr(real_driver, name)

    def cuDevicePrimaryCtxRetain(self, index: int) -> tuple[Any, str]:
        return SUCCESS, f"primary context of {index}"

    def cuCtxSetCurrent(self, context: str) -> tuple[Any]:
        self.current[threading.get_ident()] = context
        return (SUCCESS,)

    def cuModuleLoadData(self, code: bytes) -> tuple[Any, int]:
        assert code.startswith(b"\x7fELF")
        assert self.current[threading.get_ident()] == "primary context of 0"
        return SUCCESS, 1

    def cuModuleGetFunction(self, _module: int, name: bytes) -> tuple[Any, str]:
        return SUCCESS, name.decode()

    def cuFuncSetAttribute(self, _function: str, _attribute: Any, value: int) -> tuple[Any]:
        self.shared_bytes.append(value)
        return (SUCCESS,)

    def cuLaunchKernelEx(self, config: Any, function: str, arguments: Any, _x: int) -> tuple[Any]:
        self.launches.append(
            SimpleNamespace(
                function=function,
                grid=(config.gridDimX, config.gridDimY),
                threads=config.blockDimX,
                attributes=config.numAttrs,
                values=arguments[0],
                types=list(arguments[1]),
            )
        )
        return (self.status,)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[Recorder]:
    recording = Recorder()
    driver._load.cache_clear()
    monkeypatch.setenv("QDIT_CACHE", str(tmp_path))
    monkeypatch.setattr(driver, "_driver", lambda: recording)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(driver.torch, "empty", _empty_on_cpu(torch.empty))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    use(monkeypatch, H100)
    yield recording
    driver._load.cache_clear()


def _empty_on_cpu(real: Any) -> Any:
    def empty(*sizes: Any, **options: Any) -> Any:
        if options.get("device") == "cuda":
            options["device"] = "cpu"
        return real(*sizes, **options)

    return empty


def use(monkeypatch: pytest.MonkeyPatch, gpu: Gpu) -> None:
    for module in (product, rows, weight_only):
        monkeypatch.setattr(module, "gpu_of", lambda _tensor: gpu)


@pytest.mark.parametrize("gpu", [H100, A100], ids=lambda gpu: gpu.architecture)
@pytest.mark.parametrize("name", ["w4 g64", "w8 asymmetric g64 a128", "w4 g128 integer token"])
def test_a_product_s_arguments_are_its_kernel_s(
    name: str, gpu: Gpu, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, gpu)
    problem = make_problem(SCHEMES[name], 300, 1152, 384)
    made = quantize_rows(problem.x, problem.rows_kind)
    packed, tile = problem.packed, Tile(64, 2, 3)
    residual, factors = torch.zeros(300, 384).half(), torch.zeros(3, 768).half()[:, :384]
    linear(
        made, packed, problem.kind, bias=problem.bias, gate=Gate(residual, factors, 128), tile=tile
    )
    quantized, multiplied = recorder.launches
    assert quantized.types == signature("quantize.cu")
    file = "linear_sm90.cu" if gpu.hopper else "linear_sm80.cu"
    assert multiplied.types == signature(file)
    named = dict(zip(_parameters(file), multiplied.values, strict=True))
    assert named["x"] == made.values.data_ptr()
    assert named["w"] == packed.values.data_ptr()
    assert named["channel_scale"] == packed.scale.data_ptr()
    assert named["multiplier"] == (0 if packed.multiplier is None else packed.multiplier.data_ptr())
    assert named["residual"] == residual.data_ptr()
    assert named["gate"] == factors.data_ptr()
    assert (named["tokens"], named["channels"], named["panels"]) == (300, 384, 9)
    assert (named["rows"], named["weight_rows"]) == (304, 384)
    assert (named["gate_stride"], named["image_tokens"]) == (768, 128)
    # 5 × 3 tiles: all of them resident; a warpgroup more copies ahead on Hopper
    assert multiplied.grid == (15, 1)
    assert multiplied.threads == (384 if gpu.hopper else 256)
    # programmatic dependent launch where there is such a thing
    assert multiplied.attributes == (1 if gpu.hopper else 0)
    assert recorder.shared_bytes[-1] > 48 << 10


def _parameters(file: str) -> list[str]:
    text = source(file)
    found = re.search(r"qdit_linear\((.*?)\)\s*\{", text[text.index('extern "C"') :], re.DOTALL)
    assert found is not None
    return [re.findall(r"\w+", parameter)[-1] for parameter in found[1].split(",")]


def test_blocks_are_no_more_than_stay_resident(recorder: Recorder) -> None:
    problem = make_problem(SCHEMES["w4 g64"], 16384, 64, 128)
    made = quantize_rows(problem.x, problem.rows_kind)
    linear(made, problem.packed, problem.kind, tile=Tile(64))
    assert recorder.launches[-1].grid == (132, 1)


@pytest.mark.parametrize(("negatives", "heavy"), [(124, False), (125, True)])
def test_sums_of_weights_that_are_nearly_all_most_negative_start_from_nothing(
    negatives: int, heavy: bool, recorder: Recorder
) -> None:
    """127 · 16 · (8 · 124 + 7 · 4) = 2,072,640, one weight more 2,074,672: kStart is between."""
    problem = make_problem(SCHEMES["w4 g128"], 16, 256, 64)
    problem.weight.values[:] = -7
    problem.weight.values[3, 128 : 128 + negatives] = -8
    assert problem.packed.heavy == heavy
    tile = Tile(64, starts=True)
    linear(quantize_rows(problem.x, problem.rows_kind), problem.packed, problem.kind, tile=tile)
    taken = replace(tile, starts=not heavy)
    assert recorder.shared_bytes[-1] == linear_shared_bytes(problem.kind, taken, hopper=True)


def test_a_modulation_s_arguments(recorder: Recorder) -> None:
    x = torch.zeros(32, 128).half()
    both = torch.zeros(2, 6 * 128).half()
    modulation = Modulation(both[:, :128], both[:, 128:256], 16, 1e-6)
    quantize_rows(x, QuantizeKind(128, 128, normalized=True), modulation)
    (launch,) = recorder.launches
    assert launch.types == signature("quantize.cu")
    assert launch.values[1:3] == (both.data_ptr(), both.data_ptr() + 256)
    assert launch.values[3:9] == (32, 32, 32, 768, 16, 1e-6)


def test_a_weight_only_product_s_arguments(recorder: Recorder) -> None:
    scheme = LayerScheme(4, 16, 64)
    problem = make_problem(scheme, 40, 128, 384)
    packed = problem.weight
    from qdit.engines.kernels.weights import pack_weight

    weight = pack_weight([packed], scheme)
    y = weight_only_linear(problem.x, weight, WeightOnlyKind.of(scheme, 128), problem.bias)
    (launch,) = recorder.launches
    assert launch.types == signature("weight_only.cu")
    assert launch.grid == (3, 2)  # of 128 channels and 32 rows
    assert launch.values[5:11] == (40, 384, 128, 384, 1, 128)
    assert launch.values[11] == y.data_ptr()


def test_a_tile_that_does_not_fit_is_refused(recorder: Recorder) -> None:
    problem = make_problem(SCHEMES["w4 g64"], 16, 128, 64)
    made = quantize_rows(problem.x, problem.rows_kind)
    with pytest.raises(InputError, match=r"does not fit the product: .* registers"):
        linear(made, problem.packed, problem.kind, tile=Tile(256))


def test_a_launch_that_fails_names_the_driver_s_error(recorder: Recorder) -> None:
    recorder.status = real_driver.CUresult.CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES
    with pytest.raises(StepError, match="CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"):
        quantize_rows(torch.zeros(16, 128).half(), QuantizeKind(128, 128))


@pytest.mark.parametrize(
    ("major", "minor", "architecture"),
    [(8, 0, "sm_80"), (8, 9, "sm_89"), (9, 0, "sm_90a"), (10, 0, "sm_100"), (12, 0, "sm_120")],
)
def test_what_a_gpu_is_compiled_for(
    major: int, minor: int, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = SimpleNamespace(
        major=major,
        minor=minor,
        name="a GPU",
        multi_processor_count=100,
        shared_memory_per_block_optin=101376,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: facts)
    driver.gpu.cache_clear()
    found = driver.gpu(0)
    driver.gpu.cache_clear()
    assert found.architecture == architecture
    assert found.hopper == (architecture == "sm_90a")
    assert found.dependent_launch == (major >= 9)


def test_a_gpu_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = SimpleNamespace(
        major=7,
        minor=5,
        name="NVIDIA T4",
        multi_processor_count=40,
        shared_memory_per_block_optin=65536,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: facts)
    driver.gpu.cache_clear()
    with pytest.raises(InputError, match=r"8.0 or newer, NVIDIA T4 has 7.5"):
        driver.gpu(0)
