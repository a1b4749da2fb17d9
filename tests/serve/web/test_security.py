"""Keys, bodies that are too large or too slow, and what reaches from a request: nothing."""

from __future__ import annotations

import hmac
import json
import socket
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from qdit.errors import InputError
from qdit.serve.web import security
from qdit.serve.web.security import ApiKeys, AuthenticationError, read_keys

from ..conftest import Running, Switches, fake_model, running_server

URL = "/v1/images/generations"
KEYS = ("first-key-0123456789", "second-key-0123456789")
BODY = {"prompt": "cat", "num_inference_steps": 2}


@pytest.fixture
def guarded(switches: Switches) -> Iterator[Running]:
    with running_server([fake_model(switches)], keys=KEYS, body_seconds=0.3) as running:
        yield running


def raw(running: Running, *parts: bytes, pause: float = 0.0) -> bytes:
    """Send bytes as they are and read the answer's first 4 KiB."""
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)
        return connection.recv(4096)


class TestKeys:
    @pytest.mark.parametrize("key", KEYS)
    def test_each_key_opens(self, guarded: Running, key: str) -> None:
        headers = {"authorization": f"Bearer {key}"}
        assert httpx.post(guarded.url + URL, json=BODY, headers=headers).status_code == 200
        assert httpx.get(f"{guarded.url}/v1/models", headers=headers).status_code == 200

    @pytest.mark.parametrize(
        "header",
        [
            None,
            "",
            "Bearer",
            f"Basic {KEYS[0]}",
            KEYS[0],
            f"Bearer {KEYS[0]}x",
            f"Bearer {KEYS[0][:-1]}",
            f"Bearer {KEYS[0].upper()}",
            f"Bearer {KEYS[0]}, {KEYS[1]}",
            "Bearer \xff\xfe",
        ],
    )
    def test_nothing_else_does(self, guarded: Running, header: str | None) -> None:
        headers = {} if header is None else {"authorization": header.encode("latin-1")}
        for method, path in (("POST", URL), ("GET", "/v1/models"), ("GET", "/v1/nothing")):
            response = httpx.request(method, guarded.url + path, headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"

    def test_a_stranger_is_refused_before_the_body_is_read(self, guarded: Running) -> None:
        answer = raw(
            guarded,
            f"POST {URL} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            "content-length: 60000\r\n\r\n".encode(),
        )
        assert b" 401 " in answer.splitlines()[0]

    def test_health_metrics_and_the_page_are_open(self, guarded: Running) -> None:
        for path in ("/health", "/metrics", "/", "/page.js", "/openapi.json"):
            assert httpx.get(guarded.url + path).status_code == 200

    def test_every_key_is_compared_in_constant_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        compared: list[tuple[bytes, bytes]] = []
        real = hmac.compare_digest

        def compare(one: bytes, other: bytes) -> bool:
            compared.append((one, other))
            return real(one, other)

        monkeypatch.setattr(security.hmac, "compare_digest", compare)
        keys = ApiKeys(KEYS)
        keys.check(f"Bearer {KEYS[0]}")  # a match does not end the search
        assert len(compared) == 2
        with pytest.raises(AuthenticationError):
            keys.check("Bearer short")
        assert len(compared) == 4
        assert {len(one) for pair in compared for one in pair} == {32}  # digests of one length

    def test_keys_are_not_kept(self) -> None:
        assert not any(key in repr(vars(ApiKeys(KEYS))) for key in KEYS)


class TestKeyFiles:
    def test_comments_and_blank_lines(self, tmp_path: Path) -> None:
        file = tmp_path / "keys"
        file.write_text(f"# ours\n\n{KEYS[0]}  # Ann\n{KEYS[1]}\n")
        keys = read_keys(file, None)
        for key in KEYS:
            keys.check(f"Bearer {key}")

    def test_from_the_environment(self) -> None:
        read_keys(None, ",".join(KEYS)).check(f"bearer {KEYS[1]}")
        assert not read_keys(None, None)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("# none\n", "holds no API key"),
            ("short\n", "at least 16 characters; make one with"),
        ],
    )
    def test_refusals(self, tmp_path: Path, text: str, message: str) -> None:
        file = tmp_path / "keys"
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            read_keys(file, None)

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="cannot read the API keys"):
            read_keys(tmp_path / "nothing", None)


class TestBodies:
    def headers(self, **more: str) -> dict[str, str]:
        kind = {"content-type": "application/json", "authorization": f"Bearer {KEYS[0]}"}
        return kind | more

    def test_too_large_by_its_length(self, guarded: Running) -> None:
        data = json.dumps(BODY | {"user": "x" * 70_000}).encode()
        response = httpx.post(guarded.url + URL, content=data, headers=self.headers())
        assert response.status_code == 413
        assert "may have 65536 bytes" in response.json()["error"]["message"]

    def test_too_large_without_a_length(self, guarded: Running) -> None:
        def endless() -> Iterator[bytes]:
            for _ in range(40):
                yield b" " * 4096

        response = httpx.post(guarded.url + URL, content=endless(), headers=self.headers())
        assert response.status_code == 413

    def test_too_slow(self, guarded: Running) -> None:
        head = (
            f"POST {URL} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            f"authorization: Bearer {KEYS[0]}\r\ncontent-length: 1000\r\n\r\n"
        )
        started = time.monotonic()
        answer = raw(guarded, head.encode(), b'{"prompt"', pause=0.1)
        assert b" 408 " in answer.splitlines()[0]
        assert time.monotonic() - started < 3

    @pytest.mark.parametrize(
        "kind", ["text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data"]
    )
    def test_types_that_other_sites_may_send_unasked(self, guarded: Running, kind: str) -> None:
        response = httpx.post(
            guarded.url + URL,
            content=json.dumps(BODY).encode(),
            headers=self.headers(**{"content-type": kind}),
        )
        assert response.status_code == 415

    def test_a_charset_is_fine(self, guarded: Running) -> None:
        kind = "Application/JSON; charset=utf-8"
        response = httpx.post(
            guarded.url + URL,
            content=json.dumps(BODY).encode(),
            headers=self.headers(**{"content-type": kind}),
        )
        assert response.status_code == 200

    @pytest.mark.parametrize(
        "data",
        [
            b"GET /health HTTP/1.1\r\n\r\n",  # no host
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",  # TLS to a plain port
            b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
            b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
            b"GET " + b"/" * 70_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        ],
        ids=["no-host", "tls", "negative-length", "bad-chunk", "long-path"],
    )
    def test_what_is_no_http_harms_nobody(self, guarded: Running, data: bytes) -> None:
        answer = raw(guarded, data)
        assert b" 500 " not in answer.split(b"\r\n")[0]
        assert httpx.get(f"{guarded.url}/health").status_code == 200


_WATCHED = {
    "open",
    "exec",
    "compile",
    "import",
    "os.system",
    "subprocess.Popen",
    "pickle.find_class",
}


def test_what_clients_write_never_becomes_a_path_or_code(server: Running) -> None:
    """Every file that is opened and every module imported while hostile requests are answered."""
    hostile = ["/etc/passwd", "../../secret", "__import__('os')", "$(touch x)", "`id`", "a\x00b"]
    httpx.post(server.url + URL, json=BODY)  # what is imported late, is imported now
    touched: list[str] = []
    watching = True  # an audit hook cannot be removed

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event in _WATCHED:
            touched.append(f"{event} {arguments}")

    sys.addaudithook(hook)
    for text in hostile:
        for field in ("prompt", "model", "scheduler", "size", "user", "output_format"):
            httpx.post(server.url + URL, json=BODY | {field: text})
        httpx.get(f"{server.url}/v1/models/{text.encode().hex()}/../{text.replace(chr(0), '')}")
    with open(__file__, "rb"):  # noqa: PTH123  that the hook sees what it is for
        pass
    watching = False
    assert any(__file__ in line for line in touched)
    assert [line for line in touched if any(repr(text)[1:-1] in line for text in hostile)] == []


def test_small_answers_do_not_wait_for_acknowledgements(server: Running) -> None:
    """Nagle's algorithm with delayed acknowledgements would make every answer take 40 ms."""
    with httpx.Client(base_url=server.url) as client:
        times = []
        for _ in range(15):
            started = time.perf_counter()
            client.get("/health")
            times.append(time.perf_counter() - started)
    assert statistics.median(times) < 0.03
