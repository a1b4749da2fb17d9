"""`qdit-tune`: the fastest tiles for a model's products on the GPU at hand, kept in a table."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.table import Table

from ..calibrate.checkpoint import QuantizedCheckpoint
from ..calibrate.families.base import Family
from ..calibrate.model import DiffusionModel
from ..calibrate.plan import LinearSpec, QuantizationPlan
from ..calibrate.sources import load_model
from ..errors import InputError
from ..progress import Progress
from .consoles import table_console
from .devices import resolve_device
from .kernels.driver import Gpu, gpu
from .kernels.measure import Product, Tuned, tune
from .kernels.tuning import forget_tables, own_table, write_table
from .kernels.variants import LinearKind, Tile
from .options import SchemeOptions
from .torch_engine.linears import products_of

MANIFEST = "qdit.json"


def run_tune(
    source: str | None,
    scheme: SchemeOptions,
    *,
    batches: Sequence[int],
    device: str = "auto",
    output: Path | None = None,
    progress: Progress,
) -> list[Tuned]:
    """Time the tiles of every product of `source` at these batch sizes; keep and print the best.

    `source` is an exported folder or a model source. `output` is the GPU's own table in the cache
    by default (`own_table`), which the engine `torch` looks into. What was found is kept when the
    rest fails or is interrupted. Raises `InputError` without a GPU, or for a model without a
    product to tune.
    """
    here = _gpu(device)
    plan, linears, tokens = _model(source, scheme)
    products = model_products(plan, linears, [batch * tokens for batch in batches])
    if not products:
        raise InputError(
            "no linear of this plan has both sides quantized, so there is nothing to tune"
        )
    path = output or own_table(here)
    found: list[Tuned] = []
    try:
        found.extend(tune(products, here, progress=progress))
    finally:
        if found:
            _keep(path, here, found)
            progress.say(f"wrote {path}")
    table_console().print(_table(found, here))
    return found


def _gpu(device: str) -> Gpu:
    name = resolve_device(device)
    if not name.startswith("cuda"):
        raise InputError("tiles are timed on a GPU, and this machine has no CUDA device")
    return gpu(torch.device(name).index or 0)


def _model(
    source: str | None, scheme: SchemeOptions
) -> tuple[QuantizationPlan, tuple[LinearSpec, ...], int]:
    """(plan, linears, tokens an image) of an exported folder or a model source."""
    folder = None if source is None else Path(source).expanduser()
    if folder is None or not (folder / MANIFEST).is_file():
        model: DiffusionModel = load_model(source)
        return scheme.plan_for(model), tuple(model.linears), _tokens(model.family, model.denoiser)
    if scheme.model_fields_set:
        raise InputError(f"{source} was exported with its own plan; leave scheme flags out")
    checkpoint = QuantizedCheckpoint.read(folder)
    skeleton = checkpoint.skeleton()
    linears = tuple(checkpoint.family.linears(skeleton))
    return checkpoint.plan, linears, _tokens(checkpoint.family, skeleton)


def _tokens(family: Family, denoiser: torch.nn.Module) -> int:
    with torch.no_grad():
        inputs = family.example_inputs(denoiser, 1, torch.Generator().manual_seed(0))
        return int(family.before_blocks(denoiser, *inputs).hidden_states.shape[1])


def model_products(
    plan: QuantizationPlan, linears: Sequence[LinearSpec], rows: Sequence[int]
) -> list[Product]:
    """The integer products of a block's linears as the engine `torch` runs them, each once, at
    each number of rows. adaLN's have a row an image, too few for a choice of tiles to matter."""
    found: dict[tuple[LinearKind, int], Product] = {}
    in_blocks = [spec for spec in linears if spec.role != "adaln"]
    for _, own in groupby(in_blocks, key=lambda spec: (spec.block, spec.role)):
        for scheme, group in products_of(list(own), plan):
            if not (scheme.quantizes_weights and scheme.quantizes_activations):
                continue
            width, channels = group[0].in_features, sum(spec.out_features for spec in group)
            key = (LinearKind.of(scheme, width), channels)
            found.setdefault(key, Product(scheme, width, channels, 0))
    return [
        Product(product.scheme, product.width, product.channels, count)
        for count in sorted(set(rows))
        for product in found.values()
    ]


def _keep(path: Path, here: Gpu, found: Sequence[Tuned]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(
        path, here.name, {tuned.product.shape: (tuned.tile, tuned.microseconds) for tuned in found}
    )
    forget_tables()


def _table(found: Sequence[Tuned], here: Gpu) -> Table:
    table = Table(
        box=SIMPLE,
        title=here.name,
        caption="tile: tokens × channels, stages; t1, t2: in turns; p: pipelined; c: sums from a "
        "constant; k2, k3: panels shared by so many warpgroups. "
        "TOPS counts a multiply-add as two operations.",
    )
    for heading in ("rows", "K → N", "scheme", "tile", "µs", "TOPS", "before", "gain"):
        table.add_column(heading, justify="right", no_wrap=True)
    for tuned in found:
        product = tuned.product
        operations = 2 * product.rows * product.width * product.channels
        table.add_row(
            str(product.rows),
            f"{product.width} → {product.channels}",
            product.scheme.label,
            _short(tuned.tile),
            f"{tuned.microseconds:.1f}",
            f"{operations / tuned.microseconds / 1e6:.0f}",
            _short(tuned.before),
            f"{tuned.before_microseconds / tuned.microseconds:.2f}×",
        )
    return table


def _short(tile: Tile) -> str:
    marks = (f" t{tile.turns}" if tile.turns else "") + (" p" if tile.pipelined else "")
    marks += (" c" if tile.starts else "") + (f" k{tile.splits}" if tile.splits > 1 else "")
    return f"{tile.tokens}×{tile.channels} {tile.stages}{marks}"
