"""Find the fastest tile of a product on the GPU at hand: what `qdit-tune` runs."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch

from ...calibrate.quantizers import quantize_weight_nearest
from ...calibrate.schemes import LayerScheme
from ...errors import StepError
from ...progress import Progress, Silent
from .driver import Gpu
from .operands import QuantizedRows
from .product import linear, linear_kernel
from .rows import quantize_rows
from .timing import copies_beyond_cache, graph_microseconds
from .tuning import Shape, by_rule, candidates, kind_key, tile_for
from .variants import LinearKind, QuantizeKind, Tile, tile_problem
from .weights import PackedWeight, pack_weight

# Microseconds of one product with a tile.
Timer = Callable[["Product", Tile], float]

_SHORTLIST = 24  # of the tiles that the rule likes best
_FINALISTS = 6  # whose other forms (turns, fewer stages) are tried as well
_SPREAD = 0.01  # a tile must be faster by this to be preferred


@dataclass(frozen=True)
class Product:
    """A product to tune: M `rows` of `width` K times `channels` N, quantized by a scheme."""

    scheme: LayerScheme
    width: int
    channels: int
    rows: int

    @property
    def kind(self) -> LinearKind:
        return LinearKind.of(self.scheme, self.width)

    @property
    def shape(self) -> Shape:
        return Shape(kind_key(self.kind), self.rows, self.channels)


@dataclass(frozen=True)
class Tuned:
    """The fastest tile, and the one that was chosen before, both in microseconds."""

    product: Product
    tile: Tile
    microseconds: float
    before: Tile
    before_microseconds: float
    tried: int


def tune(
    products: Sequence[Product],
    gpu: Gpu,
    *,
    timer: Timer | None = None,
    progress: Progress | None = None,
) -> Iterator[Tuned]:
    """Each product's fastest tile, as they are found.

    The tiles that the rule likes best are timed for every product, then other forms of each
    product's fastest. `timer` is `GraphTimer(gpu)` by default. A tile that fails to run is passed
    over; a product where every one does raises `StepError` with the last cause.
    """
    shown = progress or Silent()
    timing = timer or GraphTimer(gpu)
    searches = [_TileSearch(product, gpu, timing) for product in dict.fromkeys(products)]

    def timed(rounds: list[tuple[_TileSearch, list[Tile]]]) -> Iterator[_TileSearch]:
        if timer is None:
            jobs = [(search.product.kind, tile) for search, tiles in rounds for tile in tiles]
            _compile_all(jobs, gpu, shown)
        for search, tiles in shown.track(rounds, "timing tiles", len(rounds)):
            search.measure(tiles)
            yield search

    for _ in timed([(search, search.likely()) for search in searches]):
        pass
    for search in timed([(search, search.forms_of_the_fastest()) for search in searches]):
        yield search.found()


class _TileSearch:
    """One product's tiles and their times, microseconds."""

    def __init__(self, product: Product, gpu: Gpu, timer: Timer) -> None:
        self.product = product
        self._gpu = gpu
        self._timer = timer
        self._before = tile_for(product.kind, product.rows, product.channels, gpu)
        self._times: dict[Tile, float] = {}
        self._failure: Exception | None = None

    def likely(self) -> list[Tile]:
        """The tile in use, and those that the rule likes best."""
        return list(dict.fromkeys([self._before, *shortlist(self.product, self._gpu)]))

    def forms_of_the_fastest(self) -> list[Tile]:
        """Other forms of the fastest so far, without those that were timed."""
        fastest = sorted(self._times, key=self._times.__getitem__)[:_FINALISTS]
        forms = (
            form for tile in fastest for form in other_forms(self.product.kind, tile, self._gpu)
        )
        return [form for form in dict.fromkeys(forms) if form not in self._times]

    def measure(self, tiles: Sequence[Tile]) -> None:
        for tile in tiles:
            self._measure(tile)

    def _measure(self, tile: Tile) -> None:
        try:
            self._times[tile] = self._timer(self.product, tile)
        except StepError as error:
            self._failure = error

    def found(self) -> Tuned:
        if not self._times:
            raise StepError(f"no tile of {self.product.shape} runs") from self._failure
        best = min(self._times, key=self._times.__getitem__)
        held = self._times.get(self._before, float("inf"))
        if held <= self._times[best] * (1 + _SPREAD):
            best = self._before
        return Tuned(self.product, best, self._times[best], self._before, held, len(self._times))


def shortlist(product: Product, gpu: Gpu) -> list[Tile]:
    """The tiles worth timing first."""
    work = by_rule(product.rows, product.channels, gpu)
    return sorted(candidates(product.kind, gpu, turns=(0,)), key=work)[:_SHORTLIST]


def other_forms(kind: LinearKind, tile: Tile, gpu: Gpu) -> list[Tile]:
    """The same cut in turns, pipelined, with fewer stages, and each with sums that start from a
    constant."""
    plain = [
        tile,
        replace(tile, turns=1),
        replace(tile, turns=2),
        replace(tile, turns=0, pipelined=True),
        replace(tile, stages=max(2, tile.stages - 1)),
    ]
    if tile.warpgroups == 1:  # few tiles, which leaves room for more warpgroups on each
        plain += [
            Tile(tile.tokens, splits, stages, splits=splits)
            for splits in (2, 3)
            for stages in (tile.stages, max(2, tile.stages - 1), max(2, tile.stages - 2))
        ]
    forms = plain + [replace(form, starts=True) for form in plain]
    return [form for form in forms if form != tile and tile_problem(kind, form, gpu) is None]


def _compile_all(jobs: Sequence[tuple[LinearKind, Tile]], gpu: Gpu, progress: Progress) -> None:
    """Compile what will be timed, on all cores: NVRTC takes most of the time."""
    distinct = list(dict.fromkeys(jobs))

    def compile_one(job: tuple[LinearKind, Tile]) -> None:
        linear_kernel(*job, gpu, gated=False, dtype=torch.float16)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = pool.map(compile_one, distinct)
        for _ in progress.track(compiled, "compiling tiles", len(distinct)):
            pass


class GraphTimer:
    """Times products on random operands; those of the last product are kept."""

    def __init__(self, gpu: Gpu, repeats: int = 5) -> None:
        self._device = torch.device("cuda", gpu.index)
        self._repeats = repeats
        self._operands: dict[Product, tuple[list[QuantizedRows], PackedWeight]] = {}

    def __call__(self, product: Product, tile: Tile) -> float:
        """Median microseconds. Raises `StepError` where the driver refuses the launch."""
        if product not in self._operands:
            self._operands = {product: random_operands(product, self._device)}
        rows, weight = self._operands[product]
        calls = [partial(linear, own, weight, product.kind, tile=tile) for own in rows]
        with torch.cuda.device(self._device):
            return statistics.median(graph_microseconds(calls, self._repeats))


def random_operands(
    product: Product, device: torch.device
) -> tuple[list[QuantizedRows], PackedWeight]:
    """Normal numbers, quantized: several sets of rows, so that none is found in a cache."""
    kind = QuantizeKind.of(product.scheme, product.width)
    copies = copies_beyond_cache(product.rows * product.width)
    rows = [
        quantize_rows(torch.randn(product.rows, product.width, device=device).half(), kind)
        for _ in range(copies)
    ]
    weight = torch.randn(product.channels, product.width, device=device) * 0.05
    quantized = quantize_weight_nearest(weight, product.scheme)
    return rows, pack_weight([quantized], product.scheme, product.kind)
