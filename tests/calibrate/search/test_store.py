"""Stored candidates: what is written is read back, and nothing else is."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from qdit.calibrate.plan import QuantizationPlan
from qdit.calibrate.schemes import LayerScheme
from qdit.calibrate.search.fitness import Fitness
from qdit.calibrate.search.store import CandidateStore

KEY = "ab" * 32
PLAN = QuantizationPlan("w4a8", {"linear": LayerScheme()})
OTHER = QuantizationPlan("w4a8", {"linear": LayerScheme(weight_group=64)})
FITNESS = Fitness(12.5, 24.25, 3.5)


@pytest.fixture
def store(tmp_path: Path) -> CandidateStore:
    store = CandidateStore(tmp_path, KEY)
    store.put(PLAN, FITNESS)
    return store


@pytest.mark.parametrize(
    "fitness",
    [FITNESS, Fitness(12.5, None, 0.0), Fitness(math.inf, None, 1.0)],
    ids=["plain", "no-psnr", "broken-images"],
)
def test_a_fitness_comes_back_whole(tmp_path: Path, fitness: Fitness) -> None:
    CandidateStore(tmp_path, KEY).put(PLAN, fitness)
    again = CandidateStore(tmp_path, KEY).get(PLAN)
    assert again == fitness
    assert again is not None
    assert again.seconds == fitness.seconds


def test_other_plans_and_other_keys_have_none(tmp_path: Path, store: CandidateStore) -> None:
    assert store.get(OTHER) is None
    assert CandidateStore(tmp_path, "cd" * 32).get(PLAN) is None
    assert len(store) == 1


def test_the_file_is_what_the_docstring_says(store: CandidateStore) -> None:
    (path,) = store.folder.iterdir()
    assert path.name == f"{PLAN.digest}.json"
    assert json.loads(path.read_text()) == {
        "version": 1,
        "plan": PLAN.digest,
        "fid": 12.5,
        "psnr_db": 24.25,
        "seconds": 3.5,
    }


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"plan": OTHER.digest},
        {"fid": "12.5"},
        {"fid": -1.0},
        {"fid": True},
        {"psnr_db": [24]},
        {"seconds": None},
        {"extra": 1},
    ],
    ids=lambda change: "-".join(map(str, next(iter(change.items())))),
)
def test_a_file_that_says_something_else_counts_as_absent(
    store: CandidateStore, change: dict[str, object]
) -> None:
    (path,) = store.folder.iterdir()
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert store.get(PLAN) is None


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff\xfe", b"[]", b'{"fid": NaN}'],
    ids=["empty", "cut", "binary", "list", "nan"],
)
def test_a_damaged_file_counts_as_absent_and_is_written_anew(
    store: CandidateStore, data: bytes
) -> None:
    (path,) = store.folder.iterdir()
    path.write_bytes(data)
    assert store.get(PLAN) is None
    store.put(PLAN, FITNESS)
    assert store.get(PLAN) == FITNESS
