"""A small exported folder, and a Triton server where one is installed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from qdit.calibrate.schemes import LayerScheme
from qdit.export.qdq import export_qdq

SERVER_VARIABLE = "QDIT_TRITONSERVER"


@pytest.fixture(scope="session")
def exported(make_quantized: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("exported")
    checkpoint = make_quantized(LayerScheme(4, 8, 32, 32)).checkpoint
    checkpoint.write(made)
    export_qdq(checkpoint, made / "model.onnx")
    return made


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A checkpoint and its reference form, w4a8 g32: a copy of the test's own."""
    return Path(shutil.copytree(exported, tmp_path / "exported"))


@pytest.fixture(scope="session")
def tritonserver() -> Path:
    """The server's program: $QDIT_TRITONSERVER, or the one that the package nvidia-pytriton has."""
    named = os.environ.get(SERVER_VARIABLE)
    if named:
        return Path(named)
    found = importlib.util.find_spec("pytriton")
    if found is None or found.origin is None:
        pytest.skip(f"needs a Triton server: {SERVER_VARIABLE}, or pip install nvidia-pytriton")
    return Path(found.origin).parent / "tritonserver" / "bin" / "tritonserver"


@pytest.fixture
def serve_repository(tritonserver: Path, tmp_path: Path) -> Callable[[Path], Any]:
    """A context manager (repository) → (address of the running server, its log), ready or ended."""

    @contextmanager
    def serving(repository: Path) -> Iterator[tuple[str, Path]]:
        tritonserver.chmod(0o755)  # a wheel's files come without the right to be run
        http, grpc = free_port(), free_port()
        log = tmp_path / "server.log"
        backends = python_backend(tritonserver.parent.parent, tmp_path / "backends")
        command = [
            tritonserver, f"--model-repository={repository}", f"--backend-directory={backends}",
            "--http-address=127.0.0.1", f"--http-port={http}", "--grpc-address=127.0.0.1",
            f"--grpc-port={grpc}", "--allow-metrics=false", "--exit-timeout-secs=5",
        ]  # fmt: skip
        libraries = tritonserver.parents[3] / "nvidia_pytriton.libs"
        environment = os.environ | {"LD_LIBRARY_PATH": str(libraries)}
        with log.open("w") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment
            )
        try:
            wait_until_ready(process, http)
            yield f"127.0.0.1:{http}", log
        finally:
            process.terminate()
            process.wait(30)

    return serving


def python_backend(server: Path, made: Path) -> Path:
    """The server's Python backend with the stub of this very Python version, which the wheel keeps
    elsewhere; its libraries are found from where they lie."""
    shutil.copytree(server / "backends" / "python", made / "python")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    if stub.is_file():
        shutil.copy(stub, made / "python" / stub.name)
        (made / "python" / stub.name).chmod(0o755)
    return made


def wait_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    """Return when the server is ready, or has ended."""
    until = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < until:
        if answers(f"http://127.0.0.1:{port}/v2/health/ready"):
            return
        time.sleep(0.1)


def answers(address: str) -> bool:
    try:
        with urlopen(address, timeout=2):
            return True
    except (URLError, OSError):
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
