"""OpenAI's own Python client against the server: what it can call, works."""

from __future__ import annotations

import base64
import io
from typing import Any

import openai
import pytest
from PIL import Image

from ..conftest import Running, Switches, fake_model, running_server

KEY = "a-key-of-at-least-16-characters"


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.owned_by, model.object) == ("fake-w4a8", "qdit", "model")
    assert client.models.retrieve("fake-w4a8").id == "fake-w4a8"


def test_generate(client: openai.OpenAI) -> None:
    made = client.images.generate(
        model="fake-w4a8",
        prompt="cat",
        n=2,
        size="auto",
        response_format="b64_json",
        extra_body={"seed": 5, "num_inference_steps": 4, "guidance_scale": 2.0},
    )
    assert made.data is not None
    assert len(made.data) == 2
    for image in made.data:
        assert image.b64_json is not None
        assert Image.open(io.BytesIO(base64.b64decode(image.b64_json))).size == (8, 8)
    assert made.usage is not None
    assert made.usage.output_tokens == 32
    assert made.model_extra is not None
    assert made.model_extra["num_inference_steps"] == 4


def test_stream(client: openai.OpenAI) -> None:
    stream: Any = client.images.generate(
        prompt="cat",
        stream=True,
        partial_images=2,
        extra_body={"seed": 5, "num_inference_steps": 6},
    )
    events = list(stream)
    kinds = [event.type.rpartition(".")[2] for event in events]
    assert kinds.count("partial_image") == 2
    assert kinds[0] == "progress"
    assert kinds[-1] == "completed"
    assert [e.partial_image_index for e in events if e.type.endswith("partial_image")] == [0, 1]
    finished = events[-1]
    alone = client.images.generate(prompt="cat", extra_body={"seed": 5, "num_inference_steps": 6})
    assert alone.data is not None
    assert finished.b64_json == alone.data[0].b64_json
    assert finished.usage.total_tokens == 17
    assert (finished.output_format, finished.size) == ("png", "8x8")


def test_errors_are_the_clients_own_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.images.generate(prompt="nothing")
    assert (bad.value.param, bad.value.code) == ("prompt", "unknown_class")
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="cat", model="gpt-image-1")


def test_a_failure_in_a_stream_is_raised(
    server: Running, client: openai.OpenAI, switches: Switches
) -> None:
    switches.gate.clear()
    stream: Any = client.images.generate(prompt="cat", stream=True)
    assert next(stream).type == "image_generation.progress"
    switches.broken = True
    switches.gate.set()
    with pytest.raises(openai.APIError, match="device lost"):
        list(stream)


def test_keys(switches: Switches) -> None:
    with running_server([fake_model(switches)], keys=(KEY,)) as running:
        base = f"{running.url}/v1"
        assert openai.OpenAI(base_url=base, api_key=KEY).models.list().data
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=base, api_key=KEY + "x", max_retries=0).models.list()


def test_its_retries_come_through_a_full_queue(switches: Switches) -> None:
    """429 with Retry-After is what the client waits for by itself."""
    with running_server([fake_model(switches)], max_queue=1) as running:
        switches.gate.clear()
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=5)
        holding: Any = client.images.generate(prompt="cat", stream=True)
        next(holding)
        with pytest.raises(openai.RateLimitError) as refused:
            client.with_options(max_retries=0).images.generate(prompt="cat")
        assert refused.value.response.headers["retry-after"] == "1"
        switches.gate.set()
        assert client.images.generate(prompt="cat").data
        holding.close()
