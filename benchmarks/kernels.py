"""The linears of a DiT block on the CUDA kernels against bfloat16 in cuBLAS, quantization included.

    python benchmarks/kernels.py --rows 512,4096,16384 --json build/kernels.json

Each figure is the median over --repeats replays of a CUDA graph whose calls take turns with enough
operands that none is found in the second-level cache; both sides are timed in turns in one run, so
that clocks and heat are the same for both. A ratio above 1 is faster than bfloat16. Tiles are those
that the engine would take (`qdit-tune --batch 2,16,64` first, for the best ones); --tune looks for
them here, and --table keeps what it found as `qdit-tune` does (the table that ships was made so).
--parts adds the product alone and what quantizes its rows: alone, after layer
normalization and modulation, and after GELU.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product as pairs
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.table import Table
from torch.nn import functional

from qdit.calibrate.quantizers import quantize_weight_nearest
from qdit.calibrate.schemes import LayerScheme
from qdit.engines.consoles import table_console
from qdit.engines.kernels.driver import gpu
from qdit.engines.kernels.measure import Product, tune
from qdit.engines.kernels.operands import Modulation
from qdit.engines.kernels.product import linear
from qdit.engines.kernels.rows import quantize_rows
from qdit.engines.kernels.timing import Call, copies_beyond_cache, graph_microseconds
from qdit.engines.kernels.tuning import tile_for, write_table
from qdit.engines.kernels.variants import LinearKind, QuantizeKind, Tile
from qdit.engines.kernels.weights import pack_weight
from qdit.engines.machine import describe_machine
from qdit.files import write_json
from qdit.progress import Terminal

SHAPES = ((1152, 3456), (1152, 1152), (1152, 4608), (4608, 1152))  # K → N of DiT-XL
SCHEMES = {
    "w8a8 g128": LayerScheme(8, 8, 128, 128),
    "w4a8 g128": LayerScheme(4, 8, 128, 128),
    "w8a8 token": LayerScheme(8, 8, "channel", "token"),
    "w4a8 token, integer scales": LayerScheme(4, 8, 128, "token", scale_format="integer"),
}
# multiply-adds of int8 a clock and multiprocessor, at the clock that vendors give the peak for
HOPPER_PEAK_TOPS = 1979.0  # H100 SXM and H200, dense: NVIDIA's data sheets


@dataclass(frozen=True)
class Timing:
    """One product of a scheme beside bfloat16, microseconds by replay."""

    scheme: str
    rows: int
    width: int
    channels: int
    tile: Tile
    bfloat16: list[float]
    ours: list[float]
    parts: dict[str, float]

    @property
    def ratio(self) -> float:
        return statistics.median(self.bfloat16) / statistics.median(self.ours)

    def tops(self, microseconds: float) -> float:
        return 2 * self.rows * self.width * self.channels / microseconds / 1e6

    def to_json(self) -> dict[str, Any]:
        own = {key: value for key, value in vars(self).items() if key != "tile"}
        return own | {"tile": self.tile.to_json(), "ratio": self.ratio}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="512,4096,16384")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--table", type=Path, help="with --tune and --parts: a table of tiles")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.table and not (arguments.tune and arguments.parts):
        parser.error("--table keeps the tiles of --tune and their times of --parts; give both")
    return arguments


def main() -> None:
    arguments = parse()
    rows = [int(count) for count in arguments.rows.split(",")]
    timings: list[Timing] = []
    with Terminal() as progress, torch.inference_mode():
        products = [
            Product(scheme, width, channels, count)
            for count, scheme, (width, channels) in pairs(rows, SCHEMES.values(), SHAPES)
        ]
        tiles = _tiles(products, arguments.tune, progress)
        cases = list(pairs(rows, SHAPES))
        for count, (width, channels) in progress.track(cases, "timing", len(cases)):
            timings += time_shape(count, width, channels, tiles, arguments.repeats, arguments.parts)
    print_table(timings)
    if arguments.table:
        keep_tiles(arguments.table, timings)
    if arguments.json:
        write_json(
            arguments.json,
            {"machine": describe_machine(), "timings": [timing.to_json() for timing in timings]},
        )


def _tiles(products: Sequence[Product], tuned: bool, progress: Terminal) -> dict[Product, Tile]:
    here = gpu(0)
    if tuned:
        return {found.product: found.tile for found in tune(products, here, progress=progress)}
    return {own: tile_for(own.kind, own.rows, own.channels, here) for own in products}


def time_shape(
    count: int,
    width: int,
    channels: int,
    tiles: dict[Product, Tile],
    repeats: int,
    with_parts: bool,
) -> Iterator[Timing]:
    """Every scheme beside bfloat16, in turns: drift of the clock hits both."""
    plain = bfloat16_calls(count, width, channels)
    for name, scheme in SCHEMES.items():
        product = Product(scheme, width, channels, count)
        tile = tiles[product]
        calls = quantized_calls(product, tile)
        bfloat16: list[float] = []
        ours: list[float] = []
        for _ in range(repeats):
            bfloat16 += graph_microseconds(plain, 1)
            ours += graph_microseconds(calls["whole"], 1)
        parts = {
            part: statistics.median(graph_microseconds(own, repeats))
            for part, own in calls.items()
            if with_parts and part != "whole"
        }
        yield Timing(name, count, width, channels, tile, bfloat16, ours, parts)


def bfloat16_calls(count: int, width: int, channels: int) -> list[Call]:
    weight = torch.randn(channels, width, device="cuda", dtype=torch.bfloat16) * 0.05
    bias = torch.randn(channels, device="cuda", dtype=torch.bfloat16)
    xs = inputs(count, width, torch.bfloat16)
    return [partial(functional.linear, x, weight, bias) for x in xs]


def inputs(count: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    copies = copies_beyond_cache(2 * count * width)
    return [torch.randn(count, width, device="cuda", dtype=dtype) for _ in range(copies)]


def quantized_calls(product: Product, tile: Tile) -> dict[str, list[Call]]:
    """'whole' quantizes float16 rows and multiplies; the other entries are the parts of it."""
    kind: LinearKind = product.kind
    rows_kind = QuantizeKind.of(product.scheme, product.width)
    weight = torch.randn(product.channels, product.width, device="cuda") * 0.05
    packed = pack_weight([quantize_weight_nearest(weight, product.scheme)], product.scheme, kind)
    bias = torch.randn(product.channels, device="cuda", dtype=torch.float16)
    xs = inputs(product.rows, product.width, torch.float16)
    multiply: Callable[..., Any] = partial(linear, weight=packed, kind=kind, bias=bias, tile=tile)

    def whole(x: torch.Tensor) -> torch.Tensor:
        return multiply(quantize_rows(x, rows_kind))

    quantized = [quantize_rows(x, rows_kind) for x in xs]
    images = max(1, product.rows // 256)
    both = torch.randn(images, 6 * product.width, device="cuda", dtype=torch.float16)
    shift, scale = both[:, : product.width], both[:, product.width : 2 * product.width]
    modulation = Modulation(shift, scale, -(-product.rows // images), 1e-6)
    normalized = QuantizeKind.of(product.scheme, product.width, normalized=True)
    gelu = QuantizeKind.of(product.scheme, product.width, gelu="tanh")
    return {
        "whole": [partial(whole, x) for x in xs],
        "product": [partial(multiply, rows) for rows in quantized],
        "quantize": [partial(quantize_rows, x, rows_kind) for x in xs],
        "adaLN + quantize": [partial(quantize_rows, x, normalized, modulation) for x in xs],
        "GELU + quantize": [partial(quantize_rows, x, gelu) for x in xs],
    }


def keep_tiles(path: Path, timings: Sequence[Timing]) -> None:
    """The tiles with the microseconds of their products, in a table that `tuning` reads."""
    found = {}
    for timing in timings:
        own = Product(SCHEMES[timing.scheme], timing.width, timing.channels, timing.rows)
        found[own.shape] = (timing.tile, timing.parts["product"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(path, torch.cuda.get_device_name(), found)


def print_table(timings: Sequence[Timing]) -> None:
    table = Table(
        box=SIMPLE,
        title=torch.cuda.get_device_name(),
        caption="whole: rows quantized and multiplied, with bias. TOPS and % of the int8 peak "
        f"({HOPPER_PEAK_TOPS:.0f} on Hopper) are of the whole. bf16 / whole above 1 is faster.",
    )
    for heading in ("rows", "K → N", "scheme", "bf16 µs", "whole µs", "min … max", "TOPS", "peak"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("bf16 / whole", justify="right")
    for timing in timings:
        median = statistics.median(timing.ours)
        table.add_row(
            str(timing.rows),
            f"{timing.width} → {timing.channels}",
            timing.scheme,
            f"{statistics.median(timing.bfloat16):.1f}",
            f"{median:.1f}",
            f"{min(timing.ours):.1f} … {max(timing.ours):.1f}",
            f"{timing.tops(median):.0f}",
            f"{timing.tops(median) / HOPPER_PEAK_TOPS:.0%}",
            f"{timing.ratio:.3f}",
        )
    console = table_console()
    console.print(table)
    for line in (*sums(timings), *part_lines(timings)):
        console.print(line, highlight=False)


def sums(timings: Sequence[Timing]) -> Iterator[str]:
    """The four products of a block together, by rows and scheme."""
    for rows, scheme in dict.fromkeys((timing.rows, timing.scheme) for timing in timings):
        own = [t for t in timings if (t.rows, t.scheme) == (rows, scheme)]
        plain, ours = (
            sum(statistics.median(values) for values in series)
            for series in ([t.bfloat16 for t in own], [t.ours for t in own])
        )
        yield f"sum at {rows} rows, {scheme}: {plain:.1f} / {ours:.1f} µs = {plain / ours:.3f}"


def part_lines(timings: Sequence[Timing]) -> Iterator[str]:
    for timing in timings:
        if timing.parts:
            tops = timing.tops(timing.parts["product"])
            parts = ", ".join(f"{name} {value:.1f}" for name, value in timing.parts.items())
            yield (
                f"{timing.rows} × {timing.width} → {timing.channels}, {timing.scheme}, "
                f"{timing.tile}: {parts} µs; the product alone {tops:.0f} TOPS"
            )


if __name__ == "__main__":
    main()
