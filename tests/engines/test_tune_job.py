"""`qdit-tune`: which products a model has, and the table that stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from qdit.calibrate.plan import QuantizationPlan, uniform_plan
from qdit.calibrate.schemes import LayerScheme
from qdit.calibrate.sources import load_model
from qdit.engines import tune_job
from qdit.engines.kernels.driver import Gpu
from qdit.engines.kernels.measure import Product, Tuned
from qdit.engines.kernels.tuning import own_table, read_table, tile_for
from qdit.engines.kernels.variants import Tile
from qdit.engines.options import SchemeOptions
from qdit.errors import InputError, StepError
from qdit.progress import Silent

GPU = Gpu(0, "Test GPU 9000", "sm_90a", 132, 227 << 10)
TILE = Tile(48, 2, 3)
FAST_US, SLOW_US = 10.0, 20.0


@pytest.fixture(autouse=True)
def _no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tune_job, "_gpu", lambda _device: GPU)


def tuner(stop_after: int | None = None) -> Callable[..., Iterator[Tuned]]:
    """`tune` by a clock that likes `TILE`; it breaks after some products."""

    def tune(products: Sequence[Product], gpu: Gpu, *, progress: object) -> Iterator[Tuned]:
        assert gpu == GPU
        for position, product in enumerate(products):
            if position == stop_after:
                raise StepError("the CUDA driver failed: CUDA_ERROR_UNKNOWN")
            yield Tuned(product, TILE, FAST_US, Tile(64), SLOW_US, 30)

    return tune


def run(source: str | None = None, scheme: SchemeOptions | None = None, **options: Any) -> Any:
    given: dict[str, Any] = {"batches": (1, 2), "progress": Silent()} | options
    return tune_job.run_tune(source, scheme or SchemeOptions(group_size=64), **given)


def test_the_demo_s_products_and_their_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune_job, "tune", tuner())
    model = load_model(None)
    tokens, hidden = 256, model.linears[0].in_features
    found = run()
    sizes = [(t.product.rows, t.product.width, t.product.channels) for t in found]
    block = [(hidden, 3 * hidden), (hidden, hidden), (hidden, 4 * hidden), (4 * hidden, hidden)]
    assert sizes == [(tokens * batch, *size) for batch in (1, 2) for size in block]
    written = read_table(own_table(GPU))
    assert set(written.values()) == {TILE}
    assert len(written) == len(found)
    # and the engine takes it from there
    assert tile_for(found[0].product.kind, tokens, 3 * hidden, GPU) == TILE
    printed = capsys.readouterr().out
    assert f"{hidden} → {3 * hidden}" in printed
    assert "2.00×" in printed


def test_what_was_found_stays_when_the_rest_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tune_job, "tune", tuner(stop_after=3))
    with pytest.raises(StepError, match="CUDA_ERROR_UNKNOWN"):
        run(output=tmp_path / "table.json")
    assert len(read_table(tmp_path / "table.json")) == 3


def test_linears_of_one_input_are_one_product_only_where_their_schemes_agree() -> None:
    model = load_model(None)
    uniform = uniform_plan("w4a8", LayerScheme(4, 8, 64, 64), model.linears)
    first = "transformer_blocks.0.attn1.to_q"
    plan = QuantizationPlan("w4a8", {**uniform.layers, first: LayerScheme(8, 8, 64, 64)})
    hidden = model.linears[0].in_features
    products = tune_job.model_products(plan, model.linears, [64])
    assert [(p.scheme.weight_bits, p.channels) for p in products if p.width == hidden] == [
        (8, hidden),
        (4, 2 * hidden),
        (4, hidden),
        (4, 4 * hidden),
        (4, 3 * hidden),
    ]


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (SchemeOptions(bits="w4a16"), "nothing to tune"),
        (SchemeOptions(bits="w4a8", group_size=144), "multiple of 32, got 144|divide"),
    ],
)
def test_a_plan_without_products_is_refused(scheme: SchemeOptions, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(scheme=scheme)


def test_an_exported_folder_has_its_plan(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_quantized: Callable[..., Any]
) -> None:
    monkeypatch.setattr(tune_job, "tune", tuner())
    made = make_quantized(LayerScheme(4, 8, 32, 64))
    made.checkpoint.write(tmp_path)
    found = run(str(tmp_path), SchemeOptions(), batches=(4,))
    assert {tuned.product.scheme for tuned in found} == {LayerScheme(4, 8, 32, 64)}
    assert {tuned.product.rows for tuned in found} == {4 * 16}
    with pytest.raises(InputError, match="leave scheme flags out"):
        run(str(tmp_path), SchemeOptions(bits="w8a8"))


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(InputError, match="timed on a GPU"):
        run(device="cpu")
