"""One linear alone on a target, timed: the cases of `latency_bench.py`.

Random integers for weights and normal input; neither changes the time. On a CPU two warm-up runs
(memory, code paths, clock), then the median of at least five timed ones; on a GPU the kernels are
replayed as a CUDA graph, whose launches cost nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..calibrate.integers import IntegerRange
from ..calibrate.plan import LinearSpec
from ..calibrate.quantizers import QuantizedWeight
from ..calibrate.schemes import LayerScheme
from ..calibrate.search.latency import LatencyKey
from ..calibrate.search.space import Refuse, never
from ..calibrate.simulate import QuantizedLinear
from ..errors import InputError
from ..export.contents import LinearContents
from ..export.single_linear import INPUT_NAME, export_single_linear
from .benchmark.target import RunSettings
from .benchmark.targets.onnxruntime_targets import OnnxRuntimeRunner
from .kernels.timing import copies_beyond_cache, graph_microseconds
from .torch_engine.linears import Part, PlainPart, quantized_part, refuse_kernels
from .torch_engine.source import Source

_WARM_UP = 2
_FEWEST_RUNS, _MOST_RUNS, _ENOUGH_S = 5, 25, 0.03

# Milliseconds of the case's linear, which lies in a folder for a while where it is a file.
Measure = Callable[[LatencyKey, RunSettings, Path], float]


@dataclass(frozen=True)
class LatencyTarget:
    """Where single linears can be timed.

    `devices` are the kinds it runs on; `weights_matter` is False where weights are dequantized at
    load, so that how they were quantized changes nothing; `refuse` says what it cannot run.
    """

    measure: Measure
    devices: tuple[str, ...]
    weights_matter: bool = False
    refuse: Refuse = never


def measure_linear(key: LatencyKey, settings: RunSettings, folder: Path) -> float:
    """Milliseconds of one run of the case, median; `folder` takes its file for a while."""
    return latency_target(key.target).measure(key, settings, folder)


def latency_target(name: str) -> LatencyTarget:
    """The target of that name. Raises `InputError` for one that has no such measurement."""
    if name not in LATENCY_TARGETS:
        *some, last = LATENCY_TARGETS
        raise InputError(
            f"latency is measured on {', '.join(some)} or {last}, got {name!r}; "
            "choose one of them or another kind of budget"
        )
    return LATENCY_TARGETS[name]


def check_device(target: str, device: str) -> None:
    """Raise `InputError` where `target` is not timed on `device` ('cpu', 'cuda:0')."""
    devices = latency_target(target).devices
    if device.partition(":")[0] not in devices:
        raise InputError(
            f"latency of {target} is measured on {' or '.join(devices)}, got device {device}; "
            "choose another --device or another --latency-target"
        )


def _onnx(
    target: Literal["qdq", "onnxruntime"], key: LatencyKey, settings: RunSettings, folder: Path
) -> float:
    path = folder / "linear.onnx"
    export_single_linear(linear_contents(key), path, rows=key.rows, target=target)
    runner = OnnxRuntimeRunner(path, settings)
    runner.bind({INPUT_NAME: np.ascontiguousarray(_input(key).numpy())})
    return 1000 * _median_seconds(runner.run)


def _simulation(key: LatencyKey, settings: RunSettings, folder: Path) -> float:
    run = _torch_run(linear_contents(key), _input(key), settings.device)
    return 1000 * _median_seconds(run)


def _kernels(key: LatencyKey, settings: RunSettings, folder: Path) -> float:
    """The rows quantized and multiplied in float16, several operands in turn."""
    device = torch.device(settings.device)
    part = kernel_part(key, device)
    copies = copies_beyond_cache(key.rows * key.in_features)
    inputs = [_input(key).to(device, torch.float16) for _ in range(copies)]
    calls = [partial(run_part, part, x) for x in inputs]
    with torch.inference_mode(), torch.cuda.device(device):
        return statistics.median(graph_microseconds(calls)) / 1000


def kernel_part(key: LatencyKey, device: torch.device) -> Part:
    """The case as the engine `torch` holds it. Raises `InputError` where no kernel computes it."""
    contents = linear_contents(key)
    scheme, specs = key.scheme, [contents.spec]
    bias = torch.zeros(key.out_features, dtype=torch.float16, device=device)
    if not scheme.quantizes_weights:
        return PlainPart(specs, contents.weight().to(device, torch.float16), bias)
    return quantized_part(specs, scheme, [contents.quantized().to(device)], bias)


def run_part(part: Part, x: Tensor) -> Tensor:
    """y [M, N] of rows x [M, K] in float16, quantized anew."""
    return part(Source(x), None, torch.float16)


def _input(key: LatencyKey) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(key.rows, key.in_features, generator=generator)


def _median_seconds(run: Callable[[], Any]) -> float:
    for _ in range(_WARM_UP):
        run()
    seconds: list[float] = []
    started = time.perf_counter()
    while len(seconds) < _FEWEST_RUNS or (
        len(seconds) < _MOST_RUNS and time.perf_counter() - started < _ENOUGH_S
    ):
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def _torch_run(contents: LinearContents, x: torch.Tensor, device: str) -> Callable[[], Any]:
    module: torch.nn.Module
    if contents.scheme.quantizes_weights:
        module = QuantizedLinear(contents.scheme, contents.quantized(), contents.bias)
    else:
        spec = contents.spec
        module = torch.nn.Linear(spec.in_features, spec.out_features)
    module = module.to(device)
    moved = x.to(device)

    @torch.inference_mode()
    def run() -> None:
        module(moved)
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)

    return run


def linear_contents(key: LatencyKey) -> LinearContents:
    """A linear of the key's sizes with random integers: their values do not change the time."""
    n, k = key.out_features, key.in_features
    spec = LinearSpec("linear", "mlp_in", 0, k, n, True, INPUT_NAME)
    return LinearContents(
        spec,
        key.scheme,
        torch.zeros(n),
        quantized=lambda: _random_weight(n, k, key.scheme),
        weight=lambda: torch.zeros(n, k).normal_(),
    )


def _random_weight(n: int, k: int, scheme: LayerScheme) -> QuantizedWeight:
    integers = IntegerRange.of(scheme.weight_bits, scheme.weight_symmetric)
    groups = k // scheme.weight_group_size(k)
    generator = torch.Generator().manual_seed(0)
    dtype = torch.int8 if scheme.weight_symmetric else torch.uint8
    values = torch.randint(
        integers.low, integers.high + 1, (n, k), generator=generator, dtype=torch.int32
    ).to(dtype)
    zero_point = None if scheme.weight_symmetric else torch.zeros(n, groups, dtype=torch.uint8)
    return QuantizedWeight(values, torch.full((n, groups), 2.0**-8), zero_point, scheme.weight_bits)


LATENCY_TARGETS: Mapping[str, LatencyTarget] = MappingProxyType(
    {
        "qdq": LatencyTarget(partial(_onnx, "qdq"), ("cpu",)),
        "onnxruntime": LatencyTarget(partial(_onnx, "onnxruntime"), ("cpu",), True),
        "torch": LatencyTarget(_simulation, ("cpu", "cuda")),
        "torch-quantized": LatencyTarget(_kernels, ("cuda",), True, refuse_kernels),
    }
)
