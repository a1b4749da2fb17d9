"""The HTTP API over a real server, with a fake engine behind the real batcher."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import httpx
import pytest
from PIL import Image

from ..conftest import Running, Switches, fake_model, running_server

URL = "/v1/images/generations"


@pytest.fixture
def client(server: Running) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=20)


def post(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post(URL, json={"prompt": "cat", "num_inference_steps": 3} | body)


def error(response: httpx.Response) -> dict[str, Any]:
    body: dict[str, Any] = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


class TestGenerations:
    def test_an_image(self, client: httpx.Client) -> None:
        response = post(client, seed=7)
        assert response.status_code == 200
        body = response.json()
        assert body["size"] == "8x8"
        assert (body["num_inference_steps"], body["guidance_scale"]) == (3, 1.5)
        (image,) = body["data"]
        assert (image["seed"], image["label"], image["class_name"]) == (7, 1, "cat")
        picture = Image.open(io.BytesIO(base64.b64decode(image["b64_json"])))
        assert (picture.format, picture.size) == ("PNG", (8, 8))
        assert body["usage"]["total_tokens"] == 1 + 16

    def test_equal_seeds_give_equal_images(self, client: httpx.Client) -> None:
        first, again, other = (post(client, seed=seed, n=3).json()["data"] for seed in (1, 1, 2))
        assert [i["b64_json"] for i in first] == [i["b64_json"] for i in again]
        assert len({i["b64_json"] for i in first + other}) == 6
        assert [i["index"] for i in first] == [0, 1, 2]

    def test_without_a_seed_the_answer_tells_one_that_repeats_it(
        self, client: httpx.Client
    ) -> None:
        first = post(client).json()["data"][0]
        again = post(client, seed=first["seed"]).json()["data"][0]
        assert again["b64_json"] == first["b64_json"]
        assert post(client).json()["data"][0]["seed"] != first["seed"]

    @pytest.mark.parametrize(
        ("kind", "magic"), [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8"), ("webp", b"RIFF")]
    )
    def test_formats(self, client: httpx.Client, kind: str, magic: bytes) -> None:
        body = post(client, output_format=kind).json()
        assert base64.b64decode(body["data"][0]["b64_json"]).startswith(magic)
        assert body["output_format"] == kind

    @pytest.mark.parametrize("prompt", ["1", "CAT", " cat "])
    def test_prompts(self, client: httpx.Client, prompt: str) -> None:
        assert post(client, prompt=prompt).json()["data"][0]["label"] == 1

    def test_every_setting_changes_the_image(self, client: httpx.Client) -> None:
        changes: list[dict[str, Any]] = [
            {}, {"seed": 2}, {"prompt": "0"}, {"num_inference_steps": 4},
            {"guidance_scale": 3.0}, {"guidance_scale": 1.0},
            {"scheduler": "DPMSolverMultistepScheduler"},
        ]  # fmt: skip
        images = [post(client, **{"seed": 1} | c).json()["data"][0]["b64_json"] for c in changes]
        assert len(set(images)) == len(images)

    def test_nulls_mean_the_default(self, client: httpx.Client) -> None:
        body = {"prompt": "cat", "seed": 1} | dict.fromkeys(
            ["n", "size", "response_format", "output_format", "quality", "user", "stream",
             "partial_images", "num_inference_steps", "guidance_scale", "scheduler", "model"]
        )  # fmt: skip
        told = client.post(URL, json=body).json()
        assert told["num_inference_steps"] == 20
        assert (
            told["data"][0]["b64_json"]
            == (post(client, seed=1, num_inference_steps=20).json()["data"][0]["b64_json"])
        )


class TestRefusals:
    @pytest.mark.parametrize(
        ("body", "param", "message"),
        [
            ({"prompt": "dogg"}, "prompt", "a class's name or id"),
            ({"prompt": 3}, "prompt", "valid string, got 3"),
            ({"n": 0}, "n", "greater than or equal to 1, got 0"),
            ({"n": 11}, "n", "less than or equal to 10, got 11"),
            ({"n": True}, "n", "valid integer, got True"),
            ({"size": "1024x1024"}, "size", "makes 8x8 only, got '1024x1024'"),
            ({"response_format": "url"}, "response_format", "must be b64_json"),
            ({"output_format": "gif"}, "output_format", "'png', 'jpeg' or 'webp'"),
            ({"output_compression": 50}, "output_compression", "png has no output_compression"),
            ({"num_inference_steps": 251}, "num_inference_steps", "less than or equal to 250"),
            ({"num_inference_steps": "9"}, "num_inference_steps", "valid integer, got '9'"),
            ({"guidance_scale": -1}, "guidance_scale", "greater than or equal to 0"),
            ({"guidance_scale": 21}, "guidance_scale", "less than or equal to 20"),
            ({"seed": -1}, "seed", "greater than or equal to 0"),
            ({"seed": 2**63}, "seed", "less than or equal to"),
            ({"scheduler": "os.system"}, "scheduler", "must be one of DDIMScheduler, "),
            (
                {"scheduler": "PNDMScheduler", "num_inference_steps": 2},
                "num_inference_steps",
                "PNDMScheduler cannot take 2 steps",
            ),
            ({"partial_images": 1}, "partial_images", "with stream: true only"),
            ({"quality": "hd"}, "quality", "'auto' or 'standard'"),
            ({"path": "/etc/passwd"}, "path", "unknown field 'path'; known are prompt, model"),
        ],
        ids=str,
    )  # fmt: skip
    def test_bodies(
        self, client: httpx.Client, body: dict[str, Any], param: str, message: str
    ) -> None:
        response = post(client, **body)
        assert response.status_code == 400
        told = error(response)
        assert told["param"] == param
        assert message in told["message"]
        assert told["type"] == "invalid_request_error"

    def test_an_unknown_model(self, client: httpx.Client) -> None:
        response = post(client, model="../../etc/passwd")
        assert response.status_code == 404
        assert error(response)["code"] == "model_not_found"
        assert "there are fake-w4a8" in error(response)["message"]

    @pytest.mark.parametrize(
        "data",
        [b"", b"{", b"[]", b"null", b'"cat"', b"\xff\xfe", b'{"prompt": NaN}', b"[" * 50_000,
         b'{"prompt": "cat", "seed": ' + b"9" * 5000 + b"}", b'{"guidance_scale": 1e999}'],
        ids=lambda data: repr(data[:20]),
    )  # fmt: skip
    def test_what_is_no_request_object(self, client: httpx.Client, data: bytes) -> None:
        response = client.post(URL, content=data, headers={"content-type": "application/json"})
        assert response.status_code == 400
        assert len(error(response)["message"]) < 500

    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [
            ("GET", URL, 405),
            ("DELETE", "/v1/models", 405),
            ("GET", "/v1/nothing", 404),
            ("GET", "/v1/models/nothing", 404),
            ("GET", "/docs", 404),
            ("GET", "/../../etc/passwd", 404),
            ("GET", "/page/%2e%2e/app.py", 404),
        ],
    )
    def test_routes(self, client: httpx.Client, method: str, path: str, status: int) -> None:
        response = client.request(method, path)
        assert response.status_code == status
        error(response)


class TestModels:
    def test_list_and_one(self, client: httpx.Client) -> None:
        listed = client.get("/v1/models").json()
        assert listed["object"] == "list"
        (model,) = listed["data"]
        assert model["id"] == "fake-w4a8"
        assert model["classes"][1] == "cat"
        assert client.get("/v1/models/fake-w4a8").json() == model

    def test_two_models(self, switches: Switches) -> None:
        models = [fake_model(switches), fake_model(switches, "org/full")]
        with running_server(models) as running, httpx.Client(base_url=running.url) as client:
            ids = [model["id"] for model in client.get("/v1/models").json()["data"]]
            assert ids == ["fake-w4a8", "org/full"]
            assert client.get("/v1/models/org/full").json()["id"] == "org/full"
            assert post(client).json()["model"] == "fake-w4a8"
            assert post(client, model="org/full").json()["model"] == "org/full"


class TestHealthAndMetrics:
    def test_ready(self, client: httpx.Client) -> None:
        for path in ("/health", "/health/ready", "/health/live"):
            response = client.get(path)
            assert response.status_code == 200
            assert response.json()["models"] == {"fake-w4a8": "ready"}

    def test_metrics_count_what_happened(self, client: httpx.Client) -> None:
        post(client, n=2, guidance_scale=1.0)
        post(client, n=0)
        text = client.get("/metrics").text
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
        model = 'model="fake-w4a8"'
        assert float(values[f"qdit_images_total{{{model}}}"]) == 2
        assert float(values[f'qdit_jobs_total{{{model},outcome="ok"}}']) == 1
        assert float(values[f'qdit_engine_rows_total{{kind="served",{model}}}']) == 6
        assert float(values[f"qdit_engine_call_seconds_count{{{model}}}"]) == 3
        assert float(values[f"qdit_queue_images{{{model}}}"]) == 0
        assert float(values[f"qdit_ready{{{model}}}"]) == 1
        assert float(values[f'qdit_requests_total{{route="{URL}",status="200"}}']) == 1
        assert float(values[f'qdit_requests_total{{route="{URL}",status="400"}}']) == 1

    def test_paths_of_clients_make_no_series(self, client: httpx.Client) -> None:
        before = client.get("/metrics").text.count("\n")
        for number in range(20):
            client.get(f"/v1/models/{number}")
            client.get(f"/{number}")
        assert client.get("/metrics").text.count("\n") - before <= 8

    def test_the_text_is_prometheus_own_format(self, client: httpx.Client) -> None:
        from prometheus_client.parser import text_string_to_metric_families

        post(client)
        families = {f.name: f for f in text_string_to_metric_families(client.get("/metrics").text)}
        assert families["qdit_request_seconds"].type == "histogram"
        assert families["qdit_images"].type == "counter"


class TestTheDocument:
    def test_has_this_servers_limits(self, switches: Switches) -> None:
        changes = {"max_images": 3, "max_steps": 40, "default_steps": 12}
        with running_server([fake_model(switches)], **changes) as running:
            document = httpx.get(f"{running.url}/openapi.json").json()
            operation = document["paths"][URL]["post"]
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            text = json.dumps(schema["properties"]["n"])
            assert '"maximum": 3' in text
            steps = schema["properties"]["num_inference_steps"]
            assert '"maximum": 40' in json.dumps(steps)
            assert steps["default"] == 12
            assert "422" not in json.dumps(document)
            assert set(operation["responses"]) == {
                "200", "400", "401", "404", "408", "413", "415", "429", "500", "503", "504",
            }  # fmt: skip
            with httpx.Client(base_url=running.url) as client:
                assert post(client, n=4).status_code == 400

    def test_is_valid_openapi(self, client: httpx.Client) -> None:
        import jsonschema_rs  # comes with schemathesis

        document = client.get("/openapi.json").json()
        assert document["openapi"].startswith("3.1")
        for name, schema in document["components"]["schemas"].items():
            jsonschema_rs.Draft202012Validator(
                {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
            )
            assert schema["type"] == "object"

    def test_answers_fit_it(self, client: httpx.Client) -> None:
        import jsonschema_rs

        document = client.get("/openapi.json").json()

        def check(name: str, value: Any) -> None:
            jsonschema_rs.Draft202012Validator(
                {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
            ).validate(value)

        check("ImagesResponse", post(client, n=2).json())
        check("ErrorResponse", post(client, n=0).json())
        check("ModelList", client.get("/v1/models").json())
        check("HealthResponse", client.get("/health").json())

    def test_events_fit_it(self, client: httpx.Client) -> None:
        import jsonschema_rs

        document = client.get("/openapi.json").json()
        content = document["paths"][URL]["post"]["responses"]["200"]["content"]
        event_schema = content["text/event-stream"]["schema"]
        data_schema = event_schema["properties"]["data"]["contentSchema"]
        components = {"components": document["components"]}
        text = post(client, stream=True, partial_images=1, n=2).text
        blocks = [dict(line.split(": ", 1) for line in b.splitlines()) for b in text.split("\n\n")]
        events = [block for block in blocks if "data" in block]
        assert len(events) >= 5
        for event in events:
            jsonschema_rs.Draft202012Validator(event_schema | components).validate(event)
            jsonschema_rs.Draft202012Validator(data_schema | components).validate(
                json.loads(event["data"])
            )


def test_every_answer_has_an_id_and_the_security_headers(client: httpx.Client) -> None:
    ids = set()
    for response in (post(client), post(client, n=0), client.get("/"), client.get("/nothing")):
        ids.add(response.headers["x-request-id"])
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert "server" not in response.headers
    assert len(ids) == 4
