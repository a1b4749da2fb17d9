"""What a Ray cluster refuses: wrong addresses, payloads that cannot be built, too few CPUs."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest

from qdit.calibrate.search.executors.ray_cluster import RayExecutor, _places
from qdit.errors import InputError, StepError

pytest.importorskip("ray", reason="qdit[cluster] is not installed")


@pytest.mark.slow
def test_a_payload_that_cannot_be_built_is_no_candidates_fault(tiny: Any) -> None:
    broken = replace(tiny.payload, features_file=b"not a network")
    with (
        closing(RayExecutor(broken, workers=1)) as executor,
        pytest.raises(StepError, match=r"could not start: ArtifactError: .*not a loadable ONNX"),
    ):
        list(executor.evaluate(tiny.plans(1)))


@pytest.mark.parametrize("address", ["auto", "nonsense"])
def test_an_address_without_a_cluster_is_refused(
    tiny: Any, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(InputError, match=f"no Ray cluster answers at {address}"):
        RayExecutor(tiny.payload, address=address)


@pytest.mark.parametrize(
    ("cluster", "threads", "workers", "expected"),
    [
        ({"CPU": 8.0}, 2, None, ({"num_cpus": 2}, 4)),
        ({"CPU": 8.0}, 2, 3, ({"num_cpus": 2}, 3)),
        ({"CPU": 64.0, "GPU": 8.0}, 2, None, ({"num_gpus": 1, "num_cpus": 0}, 8)),
        ({"CPU": 64.0, "GPU": 8.0}, 2, 16, ({"num_gpus": 1, "num_cpus": 0}, 8)),
    ],
    ids=["cpus", "fewer-than-cpus", "gpus", "no-more-than-gpus"],
)
def test_one_actor_takes_one_place(
    cluster: dict[str, float], threads: int, workers: int | None, expected: Any
) -> None:
    assert _places(cluster, threads, workers) == expected


def test_a_cluster_without_a_place_is_refused() -> None:
    with pytest.raises(InputError, match="a GPU or 4 CPUs, got 2 CPUs"):
        _places({"CPU": 2.0}, 4, None)
