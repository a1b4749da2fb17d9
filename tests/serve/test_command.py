"""`qdit-serve` as a person starts it: a process, a signal, an exit code."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from .conftest import PATIENCE, eventually

COMMAND = [sys.executable, "-c", "from qdit.cli import serve_command; serve_command()"]
START_PATIENCE = 60.0


@contextmanager
def serving(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and the URL that it says it serves at."""
    process = subprocess.Popen(
        [*COMMAND, *arguments, "--port", "0", "--device", "cpu"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=os.environ | environment,
    )
    assert process.stderr is not None
    lines = []
    silence = threading.Timer(START_PATIENCE, process.kill)  # ends the loop over its lines
    silence.start()
    try:
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"serving (.*) at (http://\S+)", line):
                silence.cancel()
                yield process, found[2]
                return
        raise AssertionError("".join(lines))
    finally:
        silence.cancel()
        process.kill()
        process.wait(PATIENCE)


def post(url: str, **body: object) -> httpx.Response:
    body = {"prompt": "cat"} | body
    return httpx.post(f"{url}/v1/images/generations", json=body, timeout=PATIENCE)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=START_PATIENCE
    )


def test_serves_drains_and_exits_with_0(exported: Path) -> None:
    with serving(str(exported), "--max-batch", "4") as (process, url):
        first = post(url, seed=1, num_inference_steps=3)
        assert first.status_code == 200
        assert first.json()["model"] == "demo-w4a8"
        again = post(url, seed=1, num_inference_steps=3)
        assert again.json()["data"] == first.json()["data"]
        with httpx.Client(base_url=url, timeout=PATIENCE) as client:
            body = {"prompt": "dog", "num_inference_steps": 200, "stream": True}
            with client.stream("POST", "/v1/images/generations", json=body) as response:
                chunks = response.iter_text()
                next(chunks)
                process.send_signal(signal.SIGTERM)
                eventually(lambda: httpx.get(f"{url}/health").status_code == 503)
                assert post(url).status_code == 503
                rest = "".join(chunks)
        assert "image_generation.completed" in rest
        assert process.wait(PATIENCE) == 0


def test_a_second_signal_ends_it_at_once(exported: Path) -> None:
    with serving(str(exported), "--max-batch", "2") as (process, url):
        body = {"prompt": "dog", "n": 10, "num_inference_steps": 250, "stream": True}
        with httpx.stream("POST", f"{url}/v1/images/generations", json=body) as response:
            assert response.status_code == 200
            chunks = response.iter_text()  # kept: a stream that nobody holds is closed
            next(chunks)
            process.send_signal(signal.SIGINT)
            eventually(lambda: httpx.get(f"{url}/health").status_code == 503)
            started = time.monotonic()
            process.send_signal(signal.SIGINT)
            process.wait(PATIENCE)
            assert time.monotonic() - started < 10


def test_keys_from_the_environment_and_full_precision(exported: Path) -> None:
    key = "0123456789abcdef-key"
    with serving(str(exported), "--full-precision", QDIT_API_KEYS=key) as (_, url):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        headers = {"authorization": f"Bearer {key}"}
        models = httpx.get(f"{url}/v1/models", headers=headers).json()["data"]
        assert [(m["id"], m["precision"]) for m in models] == [
            ("demo-w4a8", "w4a8"),
            ("demo", "full-precision"),
        ]


class TestRefusals:
    def test_a_folder_that_is_no_export(self, tmp_path: Path) -> None:
        done = run(str(tmp_path), "--port", "0")
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: there is no qdit.json in")

    def test_a_port_that_is_taken_shows_before_the_model_loads(self, exported: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            done = run(str(exported), "--port", str(port))
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"error: cannot listen at 127.0.0.1:{port}")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--max-batch", "1"], "--max-batch: Input should be greater than or equal to 2"),
            (["--engine", "magic"], "engine must be auto or one of"),
            (["--engine", "torch"], "engine torch cannot run"),
            (["--api-keys", "nothing"], "cannot read the API keys in nothing"),
            (["--vae", "nothing"], "--vae must name a folder with an AutoencoderKL"),
            (["--device", "tpu"], "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else "",
    )
    def test_flags(self, exported: Path, arguments: list[str], message: str) -> None:
        done = run(str(exported), "--port", "0", *arguments)
        assert done.returncode == 2
        assert message in done.stderr.splitlines()[-1]

    def test_a_config_file(self, exported: Path, tmp_path: Path) -> None:
        config = tmp_path / "serve.toml"
        config.write_text("max-batch = 4\nprot = 8000\n")
        done = run(str(exported), "--config", str(config))
        assert done.returncode == 2
        assert "unknown option 'prot'; known are folder, host, port" in done.stderr


def test_help_shows_examples() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert "qdit-serve build/demo-w4a8" in done.stdout


class TestTritonRepository:
    def test_is_written_and_nothing_served(self, exported: Path, tmp_path: Path) -> None:
        pytest.importorskip("tritonclient.grpc")
        repository = tmp_path / "models"
        flags = ["--max-batch", "16", "--max-queue", "9", "--threads", "2"]
        done = run(str(exported), "--emit-triton-repository", str(repository), *flags)
        assert done.returncode == 0, done.stderr
        assert "model.onnx on the onnxruntime backend (cpu), batches up to 16" in done.stderr
        text = (repository / "demo-w4a8" / "config.pbtxt").read_text("utf-8")
        assert "max_batch_size: 16" in text
        assert "max_queue_size: 9" in text
        assert 'key: "intra_op_thread_count"' in text
        made = repository / "demo-w4a8" / "1" / "model.onnx"
        assert made.read_bytes() == (exported / "model.onnx").read_bytes()

    def test_flags_that_it_cannot_hold_are_refused(self, exported: Path, tmp_path: Path) -> None:
        repository = tmp_path / "models"
        done = run(str(exported), "--emit-triton-repository", str(repository), "--port", "8001")
        assert done.returncode == 2
        assert "--port is not read with --emit-triton-repository, got 8001" in done.stderr
        assert not repository.exists()
