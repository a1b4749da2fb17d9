"""`qdit-serve --ray` on a local cluster of two replicas: one is killed under load."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from qdit.serve.backend import ImageUpdate, ProgressUpdate
from qdit.serve.ray_cluster.ray_backend import RayBackend, _Sent

from ..conftest import eventually, settings_for
from ..test_served_model import generation

pytest.importorskip("ray.serve", reason="qdit[ray-serve] is not installed")
PATIENCE = 120.0


class TestSent:
    """What a client gets when its request begins anew on another replica."""

    def test_progress_goes_forwards_only(self) -> None:
        sent = _Sent(1)
        told = [sent.is_new(ProgressUpdate(step, 9, None)) for step in (0, 1, 4, 0, 1, 4, 5)]
        assert told == [True, True, True, False, False, False, True]

    def test_no_picture_comes_twice(self) -> None:
        sent = _Sent(2)
        first = [(0, 0), (0, None), (1, 0)]
        again = [(0, 0), (0, 1), (0, None), (1, 0), (1, 1), (1, None)]
        told = [sent.is_new(ImageUpdate(image, preview, b"")) for image, preview in first]
        assert told == [True, True, True]
        assert not sent.is_complete
        told = [sent.is_new(ImageUpdate(image, preview, b"")) for image, preview in again]
        assert told == [False, False, False, False, True, True]
        assert sent.is_complete


@dataclass(frozen=True)
class Cluster:
    url: str
    backend: RayBackend
    handle: Any

    def processes(self, count: int, without: int | None = None) -> set[int]:
        """Those of `count` replicas; asks until so many other than `without` have answered."""
        found: set[int] = set()

        def ask() -> bool:
            found.add(self.handle.about.remote().result(timeout_s=PATIENCE).process)
            return len(found - {without}) >= count

        eventually(ask, PATIENCE)
        return found - {without}

    def images(self) -> int:
        asked = [self.handle.about.remote().result(timeout_s=PATIENCE) for _ in range(8)]
        return max(one.images for one in asked)


@pytest.fixture(scope="module")
def cluster(exported: Path) -> Iterator[Cluster]:
    from ray import serve

    from qdit.serve.web.local import make_ray_app
    from qdit.serve.web.security import ApiKeys
    from qdit.serve.web.server import Server, address_of, bind

    settings = settings_for(
        exported,
        ray=True,
        replicas="2",
        replica_cpus=0.5,
        device="cpu",
        threads=1,
        max_batch=4,
        max_queue=10,
    )
    started = threading.Event()
    with bind("127.0.0.1", 0) as bound:
        served = make_ray_app(settings, lambda message: None, ApiKeys())
        server = Server(
            served.app, served.gate, served.backend.close,
            drain_seconds=5.0, max_connections=100, started=started.set,
        )  # fmt: skip
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])))
        thread.start()
        assert started.wait(PATIENCE)
        handle = serve.get_app_handle(served.backend.application)  # type: ignore[attr-defined]
        yield Cluster(address_of(bound), served.backend, handle)  # type: ignore[arg-type]
        server.stop()
        thread.join(PATIENCE)
        assert not thread.is_alive()


def post(cluster: Cluster, timeout: float = PATIENCE, **body: Any) -> httpx.Response:
    body = {"prompt": "cat", "num_inference_steps": 3} | body
    return httpx.post(f"{cluster.url}/v1/images/generations", json=body, timeout=timeout)


@pytest.mark.slow
class TestCluster:
    def test_images_are_those_of_one_process(self, cluster: Cluster, exported: Path) -> None:
        from qdit.engines.kinds.kind import EngineSettings
        from qdit.serve.local_backend import LocalBackend
        from qdit.serve.served_model import load_served
        from qdit.serve.web.metrics import Metrics

        wanted = generation(label=3, steps=4, seed=9)
        served = load_served(exported, "auto", EngineSettings("cpu", 1), None, lambda _: None)
        local = LocalBackend(
            [served], settings_for(max_batch=4).limits, {served.card.id: Metrics().observer("m")}
        )

        async def images(backend: Any) -> list[bytes]:
            return [u.data async for u in backend.generate(wanted) if isinstance(u, ImageUpdate)]

        here = asyncio.run(images(local))
        asyncio.run(local.close())
        answer = post(cluster, prompt="3", num_inference_steps=4, seed=9, guidance_scale=1.5)
        import base64

        assert [base64.b64decode(one["b64_json"]) for one in answer.json()["data"]] == here

    def test_refusals_come_through(self, cluster: Cluster) -> None:
        assert post(cluster, prompt="ship of fools").status_code == 400
        models = httpx.get(f"{cluster.url}/v1/models").json()["data"]
        assert [model["id"] for model in models] == ["demo-w4a8"]
        assert httpx.get(f"{cluster.url}/health").json()["models"] == {"demo-w4a8": "ready"}
        assert 'qdit_ready{model="demo-w4a8"} 1.0' in httpx.get(f"{cluster.url}/metrics").text

    def test_a_client_that_leaves_frees_its_places(self, cluster: Cluster) -> None:
        with ThreadPoolExecutor(1) as pool:
            leaving = pool.submit(post, cluster, timeout=2.0, n=4, num_inference_steps=250)
            eventually(lambda: cluster.images() == 4)
            assert isinstance(leaving.exception(), httpx.ReadTimeout)
        eventually(lambda: cluster.images() == 0, patience=20)

    def test_full_queues_refuse(self, cluster: Cluster) -> None:
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(post, cluster, n=4, num_inference_steps=30) for _ in range(8)]
            answers = [one.result() for one in asked]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert {answer.status_code for answer in answers} == {200, 429}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)

    def test_ray_exports_the_engines_counts(self, cluster: Cluster) -> None:
        import ray

        assert post(cluster).status_code == 200
        node = ray.nodes()[0]
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

        def exported() -> bool:
            text = httpx.get(url).text
            return "ray_qdit_images" in text and "ray_qdit_engine_call_seconds_bucket" in text

        eventually(exported, patience=60)

    def test_the_deadline_holds_without_any_replica(self, cluster: Cluster) -> None:
        late = replace(generation(label=1, steps=200, seed=1), seconds=0.2)

        async def ask() -> list[Any]:
            return [update async for update in cluster.backend.generate(late)]

        from qdit.serve.errors import RequestTimeoutError

        with pytest.raises(RequestTimeoutError):
            asyncio.run(ask())

    def test_a_replica_is_killed_under_load(self, cluster: Cluster) -> None:
        """Every request is answered once, with the images it would have had, and the replica is
        replaced."""
        victim, other = cluster.processes(2)
        bodies = [
            {"seed": i, "num_inference_steps": 20 + 5 * i, "prompt": str(i % 10)} for i in range(10)
        ]
        with ThreadPoolExecutor(len(bodies)) as pool:
            answers = [pool.submit(post, cluster, **body) for body in bodies]
            time.sleep(1.0)
            assert sum(not answer.done() for answer in answers) >= 4
            os.kill(victim, signal.SIGKILL)
            made = [answer.result() for answer in answers]
        assert [answer.status_code for answer in made] == [200] * len(bodies)
        again = [post(cluster, **body) for body in bodies]
        assert [a.json()["data"] for a in made] == [a.json()["data"] for a in again]
        assert other in cluster.processes(2, without=victim)
