"""The virtual clock by hand; what it promises of whole runs is in test_mixer.py."""

from __future__ import annotations

from qdit.serve.batching.fairness import STRETCH, FairClock


def test_an_equal_share_by_hand() -> None:
    clock = FairClock()
    assert clock.due(10) == 10 * STRETCH
    clock.serve(4, jobs=1)
    assert clock.due(3) == 4 + 3 * STRETCH
    clock.serve(6, jobs=2)  # three for each
    assert clock.now == 7


def test_an_idle_clock_stands_still() -> None:
    clock = FairClock()
    clock.serve(2, jobs=1)
    assert clock.now == 2
    assert clock.due(1) == 2 + STRETCH


def test_a_later_job_is_due_later_than_an_equal_one() -> None:
    clock = FairClock()
    first = clock.due(5)
    clock.serve(1, jobs=100)
    assert clock.due(5) > first
