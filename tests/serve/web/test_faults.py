"""What happens when too many come, when clients leave, when the engine fails, when it must stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from ..conftest import PATIENCE, Running, Switches, eventually, fake_model, running_server

URL = "/v1/images/generations"


def post(running: Running, timeout: float = PATIENCE, **body: Any) -> httpx.Response:
    body = {"prompt": "cat", "num_inference_steps": 3} | body
    return httpx.post(running.url + URL, json=body, timeout=timeout)


class InThread:
    """A request that waits for its answer elsewhere."""

    def __init__(self, ask: Callable[[], httpx.Response]) -> None:
        self.response: httpx.Response | None = None
        self._ask = ask
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.response = self._ask()

    def result(self) -> httpx.Response:
        self._thread.join(PATIENCE)
        assert self.response is not None
        return self.response


class TestTooMany:
    def test_a_full_queue_answers_429_with_retry_after(self, switches: Switches) -> None:
        with running_server([fake_model(switches)], max_queue=3) as running:
            switches.gate.clear()
            holding = InThread(lambda: post(running, n=3))
            eventually(lambda: running.images() == 3)
            refused = post(running)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "queue_full"
            switches.gate.set()
            assert holding.result().status_code == 200
            assert post(running).status_code == 200

    def test_what_would_take_too_long_is_refused_and_not_begun(self, switches: Switches) -> None:
        switches.seconds = 0.05
        with running_server([fake_model(switches)], request_timeout=2.0) as running:
            assert post(running).status_code == 200  # its speed is known now
            calls = len(switches.rows)
            refused = post(running, num_inference_steps=250)
            assert refused.status_code == 429
            assert "may take 2 s" in refused.json()["error"]["message"]
            assert len(switches.rows) == calls

    def test_a_request_past_its_time_answers_504(self, switches: Switches) -> None:
        with running_server([fake_model(switches)], request_timeout=0.3) as running:
            switches.seconds = 0.1
            late = post(running, num_inference_steps=20)
            assert late.status_code == 504
            assert late.json()["error"]["code"] == "request_timeout"
            eventually(lambda: running.images() == 0)

    def test_too_many_connections_answer_503(self, switches: Switches) -> None:
        with running_server([fake_model(switches)], max_connections=3) as running:
            switches.gate.clear()
            holding = [InThread(lambda: post(running)) for _ in range(2)]
            eventually(lambda: running.images() == 2)
            clients = [httpx.Client(base_url=running.url) for _ in range(4)]
            statuses = [client.get("/health").status_code for client in clients]
            assert 503 in statuses
            for client in clients:
                client.close()
            switches.gate.set()
            assert [one.result().status_code for one in holding] == [200, 200]


class TestLeaving:
    def test_a_client_that_leaves_is_cancelled(self, server: Running, switches: Switches) -> None:
        switches.seconds = 0.02
        with pytest.raises(httpx.ReadTimeout):
            post(server, timeout=0.3, n=4, num_inference_steps=200)
        eventually(lambda: server.images() == 0, patience=2)

    def test_before_its_first_call(self, server: Running, switches: Switches) -> None:
        switches.gate.clear()
        holding = InThread(lambda: post(server))
        eventually(lambda: server.images() == 1)
        with pytest.raises(httpx.ReadTimeout):
            post(server, timeout=0.2, n=5)
        eventually(lambda: server.images() == 1)
        served = len(switches.rows)
        switches.gate.set()
        assert holding.result().status_code == 200
        assert max(switches.rows[served:], default=0) <= 2


class TestEngine:
    def test_a_failure_answers_500_and_the_server_goes_on(
        self, server: Running, switches: Switches
    ) -> None:
        switches.broken = True
        failed = post(server)
        assert failed.status_code == 500
        assert failed.json()["error"]["code"] == "engine_failed"
        switches.broken = False
        eventually(lambda: post(server).status_code == 200)
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert "qdit_engine_failures_total" in httpx.get(f"{server.url}/metrics").text

    def test_one_that_stays_broken_turns_the_server_unready_until_it_is_back(
        self, server: Running, switches: Switches
    ) -> None:
        switches.broken = True
        assert post(server).status_code == 500
        eventually(lambda: httpx.get(f"{server.url}/health").status_code == 503)
        assert httpx.get(f"{server.url}/health/live").status_code == 200
        refused = post(server)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "10"
        assert 'qdit_ready{model="fake-w4a8"} 0.0' in httpx.get(f"{server.url}/metrics").text
        switches.broken = False
        eventually(lambda: httpx.get(f"{server.url}/health").status_code == 200)
        assert switches.reopens >= 2
        assert post(server).status_code == 200

    def test_a_call_that_hangs_shows_in_live(self, switches: Switches) -> None:
        with running_server([fake_model(switches)], call_seconds=0.2) as running:
            switches.gate.clear()
            hanging = InThread(lambda: post(running))
            eventually(lambda: httpx.get(f"{running.url}/health/live").status_code == 503)
            assert httpx.get(f"{running.url}/health/live").json()["models"] == {
                "fake-w4a8": "stalled"
            }
            switches.gate.set()
            assert hanging.result().status_code == 200
            assert httpx.get(f"{running.url}/health/live").status_code == 200

    def test_another_models_failure_is_its_own(self, switches: Switches) -> None:
        other = Switches()
        with running_server([fake_model(switches), fake_model(other, "other")]) as running:
            other.broken = True
            assert post(running, model="other").status_code == 500
            assert post(running).status_code == 200


class TestDraining:
    def test_requests_inside_end_and_new_ones_are_refused(self, switches: Switches) -> None:
        switches.seconds = 0.05
        with running_server([fake_model(switches)]) as running:
            inside = [InThread(lambda: post(running, num_inference_steps=20)) for _ in range(4)]
            eventually(lambda: running.images() == 4)
            with httpx.Client(base_url=running.url) as kept:
                assert kept.get("/health").status_code == 200
                running.stop()
                eventually(lambda: kept.get("/health").status_code == 503)
                assert kept.get("/health").json()["status"] == "not ready"
                refused = kept.post(URL, json={"prompt": "cat"})
                assert refused.status_code == 503
                assert "shutting down" in refused.json()["error"]["message"]
            assert [one.result().status_code for one in inside] == [200] * 4
            assert running.stopped.wait(PATIENCE)

    def test_patience_ends(self, switches: Switches) -> None:
        switches.seconds = 0.1
        with running_server([fake_model(switches)], drain_seconds=0.3) as running:
            started = time.monotonic()
            inside = InThread(lambda: post(running, num_inference_steps=250))
            eventually(lambda: running.images() == 1)
            running.stop()
            assert running.stopped.wait(PATIENCE)
            assert time.monotonic() - started < 8
            given_up = inside.result()
            assert given_up.status_code == 503
            assert "server stopped" in given_up.json()["error"]["message"]


def test_a_short_soak_loses_nothing_and_answers_once(switches: Switches) -> None:
    """Clients that come, leave and meet failures at random: every answer is one of those that the
    documents allow, and the books balance when all are gone."""
    switches.seconds = 0.002
    with running_server([fake_model(switches)], max_queue=12) as running:
        started = time.monotonic()

        def client(number: int) -> list[int | str]:
            outcomes: list[int | str] = []
            while time.monotonic() - started < 4:
                steps = 5 + 7 * (len(outcomes) + number) % 45
                timeout = 0.05 if len(outcomes) % 5 == number % 5 else PATIENCE
                try:
                    outcomes.append(post(running, timeout, num_inference_steps=steps).status_code)
                except httpx.TimeoutException:
                    outcomes.append("left")
                if outcomes[-1] == 429:
                    time.sleep(0.02)
            return outcomes

        def trouble() -> None:
            for _ in range(3):
                time.sleep(0.9)
                switches.failures = 2  # a call and the probe after it

        with ThreadPoolExecutor(17) as pool:
            troubled = pool.submit(trouble)
            outcomes = [o for done in pool.map(client, range(16)) for o in done]
            troubled.result()
        eventually(lambda: running.images() == 0)
        assert set(outcomes) <= {200, 429, 500, 503, "left"}
        assert outcomes.count(200) > 0
        assert outcomes.count("left") > 0
        text = httpx.get(f"{running.url}/metrics").text
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
        ok = float(values['qdit_jobs_total{model="fake-w4a8",outcome="ok"}'])
        # who left just as the image was done was counted as done
        assert outcomes.count(200) <= ok <= outcomes.count(200) + outcomes.count("left")
