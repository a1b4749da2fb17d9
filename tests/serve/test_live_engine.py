"""Probes that catch an engine that answers nonsense, and opening it again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qdit.errors import InputError, StepError
from qdit.serve.batch_size import fitting_batch_size
from qdit.serve.live_engine import LiveEngine, Opened
from qdit.serve.served_model import ServedModel

from .conftest import CARD, SAMPLED

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]


def opened(denoise: Denoise) -> LiveEngine:
    return LiveEngine(lambda: Opened(denoise, lambda: None), SAMPLED)


@pytest.mark.parametrize(
    ("denoise", "message"),
    [
        (lambda x, _t, _l: x[:1], r"must predict \[2, 3, 8, 8\], it gave \[1, 3, 8, 8\]"),
        (lambda x, _t, _l: x * torch.nan, "not finite"),
        (lambda x, _t, _l: torch.zeros_like(x), "one and the same value everywhere"),
    ],
    ids=["shape", "nan", "constant"],
)
def test_an_engine_that_answers_nonsense_does_not_start(denoise: Denoise, message: str) -> None:
    with pytest.raises(StepError, match=message):
        opened(denoise)


def test_reopening_closes_the_old_one_first() -> None:
    events: list[str] = []

    def open_it() -> Opened:
        events.append("open")
        return Opened(lambda x, _t, _l: x, lambda: events.append("close"))

    engine = LiveEngine(open_it, SAMPLED)
    engine.reopen()
    engine.close()
    engine.close()
    assert events == ["open", "close", "open", "close"]
    with pytest.raises(StepError, match="closed"):
        engine.probe()


class TestBatchSize:
    """With a clock that the engine moves: the sizes are exact."""

    @staticmethod
    def fitting(
        seconds: Callable[[int], float], sizes: tuple[int, ...] = (), largest: int | None = None
    ) -> tuple[int, list[int]]:
        now, tried = [0.0], []

        def denoise(x: Tensor, _t: Tensor, _l: Tensor) -> Tensor:
            now[0] += seconds(len(x))
            tried.append(len(x))
            return x

        served = ServedModel(CARD, SAMPLED, opened(denoise), sizes, None, largest)
        tried.clear()
        return fitting_batch_size(served, clock=lambda: now[0]), tried

    def test_no_gain_from_size_takes_the_smallest(self) -> None:
        assert self.fitting(lambda rows: 0.01 * rows)[0] == 2

    def test_an_engine_with_a_price_for_each_call_gets_large_ones(self) -> None:
        # rows a second: n / (8 + n/8) ms … 128 rows: 5.33/ms, 64 rows: 4/ms
        assert self.fitting(lambda rows: 1e-3 * (8 + rows / 8))[0] == 128

    def test_within_7_percent_is_enough(self) -> None:
        # n / (1 + n) of the best: 16/17 = 0.941 of 128/129 = 0.992 is 0.949; 8/9 is 0.896
        assert self.fitting(lambda rows: 1e-4 * (1 + rows))[0] == 16

    def test_slow_calls_stop_the_search(self) -> None:
        size, tried = self.fitting(lambda rows: 0.3 * rows)
        assert size == 2
        assert max(tried) == 4  # 1.2 s: nothing larger is tried

    def test_no_more_than_the_engine_takes(self) -> None:
        size, tried = self.fitting(lambda rows: 1e-3 * (8 + rows / 8), largest=24)
        assert (size, max(tried)) == (16, 16)
        with pytest.raises(InputError, match="takes at most 1; build it with another"):
            self.fitting(lambda rows: 0.01 * rows, largest=1)

    def test_prepared_sizes_are_all_run(self) -> None:
        size, tried = self.fitting(lambda rows: 0.01 * rows, sizes=(4, 8, 48))
        assert size == 4
        assert set(tried) == {4, 8, 48}
