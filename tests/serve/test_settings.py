"""What an operator may say, and the words that refuse the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdit.errors import InputError
from qdit.serve.settings import make_settings


def test_flat_values_find_their_places() -> None:
    made = make_settings(folder="x", port=1, max_queue=7, max_steps=50, batching="single")
    assert made.folder == Path("x")
    assert (made.limits.max_queue, made.limits.batching) == (7, "single")
    assert made.requests.max_steps == 50
    assert made.limits.max_batch is None


@pytest.mark.parametrize(
    ("text", "found"),
    [(None, (1, 1)), ("3", (3, 3)), (3, (3, 3)), ("2:8", (2, 8)), ("2:2", (2, 2))],
)
def test_replicas(text: str | int | None, found: tuple[int, int]) -> None:
    given = {} if text is None else {"replicas": text}
    assert make_settings(folder="x", ray=True, **given).cluster.replica_range == found


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"port": 70_000}, r"--port: .*less than or equal to 65535, got 70000"),
        ({"max_batch": 1}, r"--max-batch: .*greater than or equal to 2, got 1"),
        ({"request_timeout": float("inf")}, r"--request-timeout: .*finite"),
        ({"drain_seconds": -1}, r"--drain-seconds"),
        ({"batching": "magic"}, r"--batching: .*step-mixed, whole-trajectory, single"),
        ({"max_steps": 10, "default_steps": 20}, r"at most --max-steps 10, got 20"),
        ({"replicas": "2"}, r"--replicas needs --ray"),
        ({"ray": True, "replicas": "3:2"}, r"--replicas: .*must ascend, got '3:2'"),
        ({"ray": True, "replicas": "0"}, r"--replicas: .*pattern"),
        ({"ray": True, "replica_cpus": 0}, r"--replica-cpus: .*greater than 0"),
        ({"nonsense": 1}, r"unknown option 'nonsense'; known are folder, host"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_refusals(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_settings(folder="x", **values)
