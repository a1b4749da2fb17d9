"""The latency table: round trip, lookup, and every malformed file."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from qdit.calibrate.plan import LinearSpec, uniform_plan
from qdit.calibrate.schemes import LayerScheme
from qdit.calibrate.search.costs import latency_cost
from qdit.calibrate.search.latency import LatencyKey, LatencyTable, needed_keys
from qdit.calibrate.search.space import search_space
from qdit.errors import ArtifactError, InputError

KEY = LatencyKey("qdq", 64, 192, 192, LayerScheme(weight_group=64, activation_group="token"))


@pytest.fixture
def table() -> LatencyTable:
    return LatencyTable("a processor, 2 threads", {"torch": "2"}, {KEY: 0.125})


def test_round_trip(table: LatencyTable, tmp_path: Path) -> None:
    table.write(tmp_path / "t.json")
    assert LatencyTable.read(tmp_path / "t.json") == table
    assert deepcopy(table) == table  # by __reduce__, as pickling goes


def test_lookup_knows_a_group_of_all_channels(table: LatencyTable) -> None:
    written_out = LayerScheme(weight_group=64, activation_group=192)
    assert table.milliseconds("qdq", 64, 192, 192, written_out) == 0.125


def test_what_is_not_measured_is_named(table: LatencyTable) -> None:
    with pytest.raises(InputError, match=r"a processor.*\[65, 192\] × \[192, 192\].* on qdq"):
        table.milliseconds("qdq", 65, 192, 192, KEY.scheme)


def test_the_cost_sums_the_linears(linears: list[LinearSpec]) -> None:
    space = search_space(linears, LayerScheme(), "w4a8")
    keys = needed_keys(linears, space.choices, "torch", tokens=16, batch=2)
    # two blocks of equal shapes: adaLN, q k v out alike, mlp in and mlp out
    assert len(keys) == 4 + 16 + 16 + len(space.choices[linears[6].name])
    assert {key.rows for key in keys} == {2, 32}
    table = LatencyTable("here", {}, {key: float(key.out_features) for key in keys})
    costs = latency_cost(linears, table, "torch", tokens=16, batch=2)
    plan = uniform_plan("w4a8", LayerScheme(weight_group=32, activation_group=32), linears)
    assert costs.total(plan) == sum(spec.out_features for spec in linears)


def entry(**changes: Any) -> dict[str, Any]:
    return {**KEY.to_json(), "ms": 1.0, **changes}


def with_entry(value: object) -> Callable[[dict], object]:
    return lambda table: {**table, "entries": [value]}


MALFORMED: dict[str, tuple[Callable[[dict], object], str]] = {
    "no object": (lambda table: [table], "must be a JSON object"),
    "key missing": (lambda table: {"version": 1}, "it must hold"),
    "version": (lambda table: {**table, "version": 2}, "it must hold"),
    "entries": (lambda table: {**table, "entries": {}}, "entries a list"),
    "hardware": (lambda table: {**table, "hardware": 3}, "must be text"),
    "environment": (lambda table: {**table, "environment": {"torch": 2}}, "must be text"),
    "entry": (with_entry(3), "an entry must hold"),
    "entry key": (with_entry(entry(more=1)), "an entry must hold"),
    "size": (with_entry(entry(rows=0)), "positive whole numbers"),
    "size a bool": (with_entry(entry(rows=True)), "positive whole numbers"),
    "time": (with_entry(entry(ms=-1.0)), "ms must be a positive number"),
    "time a text": (with_entry(entry(ms="1")), "ms must be a positive number"),
    "target": (with_entry(entry(target=1)), "target must be text"),
    "scheme": (with_entry(entry(scheme={"weight_bits": 5})), "weight bits must be one of"),
    "group": (with_entry(entry(in_features=100)), "must divide the 100"),
}


@pytest.mark.parametrize(("damage", "match"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_tables_are_refused(
    table: LatencyTable, tmp_path: Path, damage: Callable[[dict], object], match: str
) -> None:
    path = tmp_path / "t.json"
    table.write(path)
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(ArtifactError, match=match) as caught:
        LatencyTable.read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b'{"a": NaN}'], ids=repr)
def test_bytes_that_are_no_json_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "t.json").write_bytes(data)
    with pytest.raises(ArtifactError, match="not a readable latency table"):
        LatencyTable.read(tmp_path / "t.json")
