"""The plugins' kernels as TensorRT launches them, against the same kernels launched by PyTorch.

    python benchmarks/tensorrt_plugin.py --rows 512,4096,16384 --json build/trt-plugin.json

Needs a GPU and no TensorRT. Each kernel is compiled to PTX as the plugin gives it to TensorRT,
loaded and launched through the CUDA driver alone: with the launch parameters and the integers that
the plugin layer evaluates (`engines/tensorrt/plugin/numeric.py`), arguments in TensorRT's order
(inputs, integers, outputs), no launch attributes. Outputs must equal those of the in-PyTorch kernel
to the bit; a difference ends the run with exit code 1. Both are timed in turns by CUDA graphs of
many calls. Every tactic that TensorRT would be offered is run, those beyond 48 KB of shared memory
among them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.table import Table

from qdit.calibrate.schemes import LayerScheme
from qdit.engines.consoles import table_console
from qdit.engines.kernels.driver import gpu
from qdit.engines.kernels.timing import graph_microseconds
from qdit.engines.machine import describe_machine
from qdit.engines.tensorrt.plugin.driver_launch import PluginCase, cases_of
from qdit.files import write_json
from qdit.progress import Terminal

SHAPES = ((1152, 3456), (1152, 1152), (1152, 4608), (4608, 1152))  # K → N of DiT-XL
SCHEMES = {
    "w8a8 g128": LayerScheme(8, 8, 128, 128),
    "w4a8 g128": LayerScheme(4, 8, 128, 128),
    "w4a8 g64 asymmetric": LayerScheme(4, 8, 64, 64, False, False),
    "w8a8 token": LayerScheme(8, 8, "channel", "token"),
    "w4a8 token, integer scales": LayerScheme(4, 8, 128, "token", scale_format="integer"),
    "w4a16 g128": LayerScheme(4, 16, 128),
}
_FEW = 64  # rows of a weight-only product: what its kernel is made for
_CALLS = 20  # in a graph: a launch takes a few microseconds


@dataclass
class Timing:
    """One kernel and tactic: microseconds by replay, through the driver and by PyTorch."""

    scheme: str
    plugin: str
    rows: int
    width: int
    channels: int
    tactic: int
    shared_bytes: int
    equal: bool
    driver: list[float] = field(default_factory=list)
    pytorch: list[float] = field(default_factory=list)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="512,4096,16384")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    timings: list[Timing] = []
    jobs = [
        (name, scheme, count if scheme.quantizes_activations else min(count, _FEW), *shape)
        for name, scheme in SCHEMES.items()
        for count in map(int, arguments.rows.split(","))
        for shape in SHAPES
    ]
    with Terminal() as progress, torch.inference_mode():
        for name, scheme, rows, width, channels in progress.track(jobs, "launching", len(jobs)):
            for case in cases_of(scheme, rows, width, channels, gpu(0)):
                timings += measure(name, case, arguments.repeats)
    print_table(timings)
    if arguments.json:
        found = [asdict(timing) for timing in timings]
        write_json(arguments.json, {"machine": describe_machine(), "timings": found})
    sys.exit(0 if all(timing.equal for timing in timings) else 1)


def measure(scheme: str, case: PluginCase, repeats: int) -> list[Timing]:
    """Every tactic of a plugin, compared and then timed in turns."""
    made = []
    for tactic in case.tactics():
        loaded = case.load(tactic)
        loaded.launch()
        expected = case.pytorch(tactic)
        torch.cuda.synchronize()
        timing = Timing(
            scheme,
            case.plugin.name,
            case.rows,
            case.width,
            case.channels,
            tactic,
            loaded.launch_parameters.shared_bytes,
            all(torch.equal(a, b) for a, b in zip(loaded.written(), expected, strict=True)),
        )
        for _ in range(repeats):
            timing.driver += graph_microseconds([loaded.launch] * _CALLS, 1)
            timing.pytorch += graph_microseconds([partial(case.pytorch, tactic)] * _CALLS, 1)
        made.append(timing)
    return made


def print_table(timings: list[Timing]) -> None:
    table = Table(box=SIMPLE, title="µs: through the CUDA driver as TensorRT does, and by PyTorch")
    for column in (
        "scheme",
        "plugin",
        "M",
        "K → N",
        "shared KB",
        "equal",
        "driver",
        "PyTorch",
        "×",
    ):
        table.add_column(column, justify="left" if column in ("scheme", "plugin") else "right")
    for timing in timings:
        one, other = statistics.median(timing.driver), statistics.median(timing.pytorch)
        table.add_row(
            timing.scheme,
            timing.plugin,
            str(timing.rows),
            f"{timing.width} → {timing.channels}",
            f"{timing.shared_bytes / 1024:.0f}",
            "yes" if timing.equal else "NO",
            f"{one:.1f}",
            f"{other:.1f}",
            f"{other / one:.2f}",
        )
    table_console().print(table)


if __name__ == "__main__":
    main()
