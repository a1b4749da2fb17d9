"""Requests by the document and against it: never a 500, and answers that the document describes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from ..conftest import Running, Switches, fake_model, running_server

URL = "/v1/images/generations"


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Running]:
    with running_server(
        [fake_model(Switches())], max_images=3, max_steps=12, default_steps=4
    ) as on:
        yield on


@pytest.fixture(scope="module")
def document(fuzzed: Running) -> Any:
    return schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_by_the_document(document: Any, mode: GenerationMode) -> None:
    """All of schemathesis' checks but one: no server error, documented statuses, types and bodies,
    and whatever breaks the document is refused.

    Left out: that whatever fits the schema is accepted. A schema cannot say that a prompt must be a
    class, or that png has no output_compression.
    Not by its pytest plugin, which reads an attribute that pytest 9.2 no longer has.
    """
    tried = []
    for found in document.get_all_operations():
        operation = found.ok()

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=80,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        def check(case: Any) -> None:
            case.call_and_validate(timeout=20, excluded_checks=[positive_data_acceptance])

        try:
            check()
        except Unsatisfiable:  # a GET without parameters cannot be wrong
            assert (mode, operation.method) == (GenerationMode.NEGATIVE, "get")
        tried.append(operation.label)
    assert tried == [
        f"POST {URL}",
        "GET /v1/models",
        "GET /v1/models/{model}",
        "GET /health",
        "GET /health/live",
        "GET /metrics",
    ]


def _mutated(chance: random.Random, body: dict[str, Any]) -> bytes:
    """A request's JSON with one thing wrong with it, or several."""
    values: list[Any] = [
        None, True, -1, 0, 1, 1e308, -0.0, 2**64, "", "cat", "\x00", "💥" * 50, [], {}, [[[]]],
        {"a": {"b": []}}, "../../etc/passwd", "9" * 400, float("nan"), float("inf"),
    ]  # fmt: skip
    body = dict(body)
    for _ in range(chance.randint(1, 4)):
        key = chance.choice([*body, "extra", "prompt", "__class__", "seed", "n"])
        body[key] = chance.choice(values)
    data = bytearray(json.dumps(body).encode())
    for _ in range(chance.choice([0, 0, 0, 1, 5])):
        position = chance.randrange(len(data))
        if chance.random() < 0.5:
            data[position] = chance.randrange(256)
        else:
            del data[position:][: chance.randint(1, 20)]
    if chance.random() < 0.1:
        data = data[: chance.randrange(len(data))]
    return bytes(data)


def test_mutated_bodies(fuzzed: Running) -> None:
    chance = random.Random(3)
    body = {"prompt": "cat", "n": 1, "num_inference_steps": 2, "seed": 1, "guidance_scale": 1.5,
            "stream": False, "output_format": "png", "size": "auto"}  # fmt: skip
    statuses: dict[int, int] = {}
    with httpx.Client(base_url=fuzzed.url, timeout=20) as client:
        for _ in range(600):
            headers = {"content-type": "application/json"}
            response = client.post(URL, content=_mutated(chance, body), headers=headers)
            statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
            assert response.status_code in (200, 400, 404), response.text
            if response.status_code != 200:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert client.get("/health").status_code == 200
    assert statuses[400] > 300
    assert statuses[200] > 10
