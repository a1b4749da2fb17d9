"""Measure single linears on the machine at hand: the table behind `latency-ms` budgets.

Each case is the linear alone with random integers for weights and normal input, run through the
project's own pieces: the lowering, writer and engine of the `qdq` target, the simulation for
`torch`. Noise: two warm-up runs (memory, code paths, clock), then the median of at least five
timed ones; the cases of a shape take turns for three rounds and keep their least median, since
other processes come in bursts and only ever add time. Slow drift of the machine stays in the table,
and nothing is smoothed or made monotone in the group size, since real kernels are not.
"""

from __future__ import annotations

import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..calibrate.integers import IntegerRange
from ..calibrate.plan import LinearSpec
from ..calibrate.quantizers import QuantizedWeight
from ..calibrate.schemes import LayerScheme
from ..calibrate.search.latency import LatencyKey, LatencyTable
from ..calibrate.simulate import QuantizedLinear
from ..errors import ArtifactError, InputError
from ..export.contents import LinearContents
from ..export.single_linear import INPUT_NAME, export_single_linear
from ..files import cache_folder
from ..progress import Progress, Silent
from .benchmark.target import RunSettings
from .benchmark.targets.onnxruntime_targets import OnnxRuntimeRunner
from .machine import describe_machine, library_versions, usable_cores

LATENCY_TARGETS = ("qdq", "torch")

_WARM_UP = 2
_FEWEST_RUNS, _MOST_RUNS, _ENOUGH_S = 5, 25, 0.03
_ROUNDS = 3
_SAVE_EVERY_S = 10.0
_ENVIRONMENT = ("onnxruntime", "onnxruntime-gpu", "torch", "qdit")


def measure_latencies(
    keys: Iterable[LatencyKey],
    *,
    device: str = "cpu",
    threads: int | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> LatencyTable:
    """The table that holds every one of `keys`; what the machine's cache has is not run again.

    `threads` on a CPU are all usable cores by default. `cache` is the folder of the tables,
    `latency_folder()` by default; what is measured is kept there even when the rest fails or is
    interrupted. A cache file that cannot be read, or that other library versions wrote, is made
    anew. Raises `InputError` for a target that has no such measurement.
    """
    wanted = list(dict.fromkeys(keys))
    for key in wanted:
        if key.target not in LATENCY_TARGETS:
            raise InputError(
                f"latency is measured on {' or '.join(LATENCY_TARGETS)}, got {key.target!r}; "
                "choose one of them or another kind of budget"
            )
    shown = progress or Silent()
    settings = RunSettings(device, threads or usable_cores())
    path, empty = _table_place(cache or latency_folder(), settings)
    table = _read_or_renew(path, empty, shown)
    missing = table.missing([_measured_as(key) for key in wanted])
    if missing:
        table = _measure_and_keep(missing, table, path, settings, shown)
    return table.with_times({key: table.times[_measured_as(key)] for key in wanted})


def latency_folder() -> Path:
    """`$QDIT_CACHE/latency`, by default `~/.cache/qdit/latency`."""
    return cache_folder("latency")


def hardware_name(device: str, threads: int) -> str:
    """The processor that runs on `device`, by name: 'AMD EPYC 7R13, 2 threads'."""
    machine = describe_machine()
    if not device.startswith("cuda"):
        return f"{machine['cpu']}, {threads} threads"
    gpus = machine["gpus"]
    number = int(device.partition(":")[2] or 0)
    return gpus[number]["name"] if number < len(gpus) else device


def _measured_as(key: LatencyKey) -> LatencyKey:
    """The case that stands for `key`.

    Both targets hold dequantized weights, made once at load, and multiply in float: how weights
    were quantized changes nothing at run time. Measuring it again would only add noise between
    equals, and ten times the time.
    """
    if not key.scheme.quantizes_weights:
        return key
    scheme = replace(key.scheme, weight_group="channel", weight_symmetric=True)
    return replace(key, scheme=scheme)


def _table_place(folder: Path, settings: RunSettings) -> tuple[Path, LatencyTable]:
    name = hardware_name(settings.device, settings.threads)
    versions = library_versions()
    environment = {key: versions[key] for key in _ENVIRONMENT if key in versions}
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return folder / f"{slug}.json", LatencyTable(name, environment)


def _read_or_renew(path: Path, empty: LatencyTable, progress: Progress) -> LatencyTable:
    """The cached table; `empty` where there is none, or none that holds for this environment."""
    if not path.exists():
        return empty
    try:
        table = LatencyTable.read(path)
    except ArtifactError as error:
        progress.say(f"{error.args[0].partition('; delete')[0]}; measuring again")
        return empty
    if (table.hardware, table.environment) != (empty.hardware, empty.environment):
        progress.say(f"{path} is from other library versions; measuring again")
        return empty
    return table


def _measure_and_keep(
    keys: Sequence[LatencyKey],
    table: LatencyTable,
    path: Path,
    settings: RunSettings,
    progress: Progress,
) -> LatencyTable:
    """`table` with `keys` measured, written as it grows and at the end, whatever ends it."""
    times: dict[LatencyKey, float] = {}

    def keep() -> LatencyTable:
        # another process may have measured meanwhile
        grown = _read_or_renew(path, table, Silent()).with_times({**table.times, **times})
        grown.write(path)
        return grown

    saved = time.perf_counter()
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    description = f"measuring linears on {table.hardware}"
    try:
        with tempfile.TemporaryDirectory(prefix="qdit-latency-") as folder:
            timed: dict[LatencyKey, list[float]] = {}
            turns = _turns(keys)
            for key in progress.track(turns, description, total=len(turns)):
                medians = timed.setdefault(key, [])
                medians.append(measure_linear(key, settings, Path(folder)))
                if len(medians) == _ROUNDS:
                    times[key] = min(medians)
                if time.perf_counter() - saved > _SAVE_EVERY_S:
                    keep()
                    saved = time.perf_counter()
    finally:
        torch.set_num_threads(before)
        table = keep()
    return table


def _turns(keys: Sequence[LatencyKey]) -> list[LatencyKey]:
    """A B C A B C A B C, then D E F …: each case `_ROUNDS` times, in turns with all its shape.

    What is chosen between is measured side by side: drift hits all choices of a shape alike.
    """
    shapes: dict[tuple[str, int, int, int], list[LatencyKey]] = {}
    for key in keys:
        shape = (key.target, key.rows, key.in_features, key.out_features)
        shapes.setdefault(shape, []).append(key)
    return [key for cases in shapes.values() for key in cases * _ROUNDS]


def measure_linear(key: LatencyKey, settings: RunSettings, folder: Path) -> float:
    """Milliseconds of one run of the case, median; `folder` takes its file for a while."""
    contents = _contents(key)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(key.rows, key.in_features, generator=generator)
    if key.target == "torch":
        return 1000 * _median_seconds(_torch_run(contents, x, settings.device))
    path = folder / "linear.onnx"
    export_single_linear(contents, path, rows=key.rows)
    runner = OnnxRuntimeRunner(path, settings)
    runner.bind({INPUT_NAME: np.ascontiguousarray(x.numpy())})
    return 1000 * _median_seconds(runner.run)


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


def _contents(key: LatencyKey) -> LinearContents:
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
