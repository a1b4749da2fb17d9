"""Measure single linears on the machine at hand: the table behind `latency-ms` budgets.

Each case (`single_linears.py`) is the linear alone, run through the project's own pieces: the
lowerings, writer and engine of `qdq` and `onnxruntime`, the simulation for `torch`, the CUDA
kernels for `torch-quantized`. The cases of a shape take turns for three rounds and keep their
least median, since other processes come in bursts and only ever add time. Slow drift of the machine
stays in the table, and nothing is smoothed or made monotone in the group size, since real kernels
are not.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..calibrate.search.latency import LatencyKey, LatencyTable
from ..errors import ArtifactError
from ..files import cache_folder
from ..progress import Progress, Silent
from .benchmark.target import RunSettings
from .machine import describe_machine, library_versions, usable_cores
from .single_linears import check_device, latency_target, measure_linear

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
    anew. Raises `InputError` for a target that has no such measurement, or
    none on `device`.
    """
    wanted = list(dict.fromkeys(keys))
    for key in wanted:
        check_device(key.target, device)
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

    Where a target holds dequantized weights, made once at load, how they were quantized changes
    nothing at run time. Measuring it again would only add noise between equals, and ten times the
    time.
    """
    if not key.scheme.quantizes_weights or latency_target(key.target).weights_matter:
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
