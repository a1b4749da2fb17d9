"""Which tiles are timed and which is kept, by a clock that says what it is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from qdit.engines.kernels.measure import (
    GraphTimer,
    Product,
    Tuned,
    other_forms,
    random_operands,
    shortlist,
    tune,
)
from qdit.engines.kernels.product import linear
from qdit.engines.kernels.timing import copies_beyond_cache
from qdit.engines.kernels.tuning import rule_of_thumb, tile_for
from qdit.engines.kernels.variants import Tile, tile_problem
from qdit.errors import StepError

from .conftest import SCHEMES, FakeGpu

GPU = FakeGpu()
PRODUCT = Product(SCHEMES["w4 g64"], 1152, 3456, 4096)


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QDIT_CACHE", str(tmp_path))


def tuned_by(timer: Callable[[Product, Tile], float], *products: Product) -> list[Tuned]:
    return list(tune(products or [PRODUCT], GPU, timer=timer))  # type: ignore[arg-type]


def test_the_fastest_tile_is_kept() -> None:
    fastest = shortlist(PRODUCT, GPU)[7]  # type: ignore[arg-type]
    (tuned,) = tuned_by(lambda _, tile: 5.0 if tile == fastest else 10.0)
    assert (tuned.tile, tuned.microseconds) == (fastest, 5.0)
    assert tuned.before == tile_for(PRODUCT.kind, 4096, 3456, GPU)
    assert tuned.before_microseconds == 10.0
    assert tuned.tried >= 24


def test_other_forms_of_the_fastest_are_tried() -> None:
    tile = shortlist(PRODUCT, GPU)[3]  # type: ignore[arg-type]
    turned = replace(tile, turns=2)
    (tuned,) = tuned_by(lambda _, own: {turned: 4.0, tile: 5.0}.get(own, 10.0))
    assert tuned.tile == turned


def test_a_gain_below_the_noise_changes_nothing() -> None:
    before = rule_of_thumb(PRODUCT.kind, 4096, 3456, GPU)
    (tuned,) = tuned_by(lambda _, tile: 10.0 if tile == before else 9.95)
    assert tuned.tile == before


def test_tiles_that_do_not_run_are_passed_over() -> None:
    before = rule_of_thumb(PRODUCT.kind, 4096, 3456, GPU)

    def timer(_: Product, tile: Tile) -> float:
        if tile.warpgroups == before.warpgroups:
            raise StepError("the CUDA driver failed: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES")
        return 10.0

    (tuned,) = tuned_by(timer)
    assert tuned.tile.warpgroups != before.warpgroups
    assert tuned.before_microseconds == float("inf")


def test_a_product_that_no_tile_computes_keeps_the_cause() -> None:
    def timer(_: Product, tile: Tile) -> float:
        raise StepError("the CUDA driver failed: CUDA_ERROR_UNKNOWN")

    with pytest.raises(StepError, match=r"no tile of .*4096.* runs") as caught:
        tuned_by(timer)
    assert "CUDA_ERROR_UNKNOWN" in str(caught.value.__cause__)


def test_each_product_is_timed_once() -> None:
    other = replace(PRODUCT, rows=512)
    found = tuned_by(lambda _, tile: float(tile.tokens), PRODUCT, other, PRODUCT)
    assert [tuned.product for tuned in found] == [PRODUCT, other]


def test_every_form_that_is_timed_fits() -> None:
    for tile in shortlist(PRODUCT, GPU):  # type: ignore[arg-type]
        forms = other_forms(PRODUCT.kind, tile, GPU)  # type: ignore[arg-type]
        assert tile not in forms
        assert all(tile_problem(PRODUCT.kind, form, GPU) is None for form in forms)


@pytest.mark.parametrize("name", ["w8 g128", "w4 g128 integer token", "w8 asymmetric g64 a128"])
def test_random_operands_are_the_product_s(name: str) -> None:
    product = Product(SCHEMES[name], 1152, 128, 16)
    rows, weight = random_operands(product, torch.device("cpu"))
    assert len(rows) == copies_beyond_cache(16 * 1152) == 10
    y = linear(rows[0], weight, product.kind)
    assert y.shape == (16, 128)
    assert y.isfinite().all()


@pytest.mark.parametrize(("byte_size", "copies"), [(1 << 30, 3), (50_000_000, 3), (20_000_000, 7)])
def test_calls_go_through_more_than_a_cache_holds(byte_size: int, copies: int) -> None:
    assert copies_beyond_cache(byte_size) == copies


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_timed() -> None:
    from qdit.engines.kernels.driver import gpu

    small = Product(SCHEMES["w8 g128"], 384, 384, 256)
    timer = GraphTimer(gpu(0), repeats=3)
    tile = tile_for(small.kind, 256, 384, gpu(0))
    large = replace(small, rows=16384, width=1152, channels=4608)
    assert 0.5 < timer(small, tile) < timer(large, tile) < 5000
