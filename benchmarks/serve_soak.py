"""`qdit-serve` for minutes under clients that come, leave and look closely at what they get.

    python benchmarks/serve_soak.py build/demo --minutes 10 --ray --json soak.json

Clients ask for images of a few (class, seed, steps), streamed or not, one to three at once, and
leave a quarter of their requests at a random moment. With --ray a replica is killed with SIGKILL
half-way. At the end the server gets SIGTERM while clients still ask. Exit code 1 where

* a request that was not left by its client gets no answer, or another than 200 or 429 (503 once the
  server drains);
* an image of a stream comes twice, or is missing;
* the same request gives another image than the first time;
* a request that was inside when the drain began does not get its images;
* images are still at hand after all clients paused (one process only: replicas count their own);
* memory grows: a process's median of the last quarter of the time against that of the second
  quarter, by more than --growth;
* the server's exit code is not 0.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

URL = "/v1/images/generations"
_START_SECONDS = 180
_SECONDS_BETWEEN_SAMPLES = 5.0
_SHARE_LEFT = 0.25
_CLASSES, _SEEDS = 3, 4


@dataclass
class Books:
    """What happened. `faults` is empty after a good run."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    hashes: dict[tuple[Any, ...], str] = field(default_factory=dict)
    memory: dict[int, list[float]] = field(default_factory=dict)  # MB by process
    images: int = 0
    draining: bool = False
    paused: bool = False

    def fault(self, text: str) -> None:
        self.faults.append(text)
        print(f"FAULT {text}", file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="what qdit-export wrote")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--ray", action="store_true", help="two replicas; one is killed")
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--growth", type=float, default=0.05, help="share of memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def start(options: argparse.Namespace, log: Any) -> tuple[subprocess.Popen[bytes], str]:
    """The server and its URL."""
    command = [sys.executable, "-c", "from qdit.cli import serve_command; serve_command()"]
    command += [str(options.folder), "--port", "0", "--max-batch", str(options.max_batch)]
    command += ["--threads", str(options.threads), "--max-queue", str(2 * options.clients)]
    if options.ray:
        command += ["--ray", "--replicas", "2", "--replica-cpus", "0.5", "--device", "cpu"]
    process = subprocess.Popen(command, stderr=log)
    until = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.2)
        log.seek(0)
        if found := re.search(r"serving .* at (http://\S+)", log.read()):
            return process, found[1]
    process.kill()
    log.seek(0)
    raise RuntimeError(f"the server did not start:\n{log.read()}")


async def client(number: int, url: str, books: Books, seed: int) -> None:
    """One client: asks until there is no server any more."""
    chance = random.Random(f"{seed} {number}")
    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        while True:
            while books.paused:
                await asyncio.sleep(0.05)
            body = {
                "prompt": str(chance.randrange(_CLASSES)),
                "seed": chance.randrange(_SEEDS),
                "num_inference_steps": chance.choice([5, 10, 20, 50]),
                "guidance_scale": chance.choice([1.0, 1.5]),
                "n": chance.choice([1, 1, 2, 3]),
                "stream": chance.random() < 0.5,
            }
            patience = chance.uniform(0, 1.5) if chance.random() < _SHARE_LEFT else None
            was_draining = books.draining
            outcome = await ask(http, body, patience, books)
            books.outcomes[outcome] += 1
            judge(outcome, body, was_draining, books)
            if outcome == "no server" and books.draining:
                return
            if outcome in ("429", "503"):
                await asyncio.sleep(chance.uniform(0.2, 0.6))


async def ask(
    http: httpx.AsyncClient, body: dict[str, Any], patience: float | None, books: Books
) -> str:
    """One request to its end: 'ok', 'left', a status, or 'lost: …'."""
    try:
        answered = (streamed if body["stream"] else whole)(http, body, books)
        return await asyncio.wait_for(answered, patience)
    except asyncio.TimeoutError:  # not TimeoutError before Python 3.11
        return "left"
    except httpx.ConnectError:
        return "no server"
    except httpx.HTTPError as error:
        return f"lost: {type(error).__name__} {error}"


async def whole(http: httpx.AsyncClient, body: dict[str, Any], books: Books) -> str:
    answer = await http.post(URL, json=body)
    if answer.status_code != 200:
        return str(answer.status_code)
    data = answer.json()["data"]
    if [one["index"] for one in data] != list(range(body["n"])):
        books.fault(f"{body} gave the images {[one['index'] for one in data]}")
    for one in data:
        compare(body, one["index"], one["b64_json"], books)
    return "ok"


async def streamed(http: httpx.AsyncClient, body: dict[str, Any], books: Books) -> str:
    seen: list[int] = []
    async with http.stream("POST", URL, json=body) as answer:
        if answer.status_code != 200:
            return str(answer.status_code)
        async for line in answer.aiter_lines():
            if not line.startswith("data:"):
                continue
            event = json.loads(line[5:])
            if "error" in event:
                return str(event["error"]["code"])
            if event["type"] == "image_generation.completed":
                seen.append(event["index"])
                compare(body, event["index"], event["b64_json"], books)
    if sorted(seen) != list(range(body["n"])):
        books.fault(f"a stream of {body} gave the images {seen}")
    return "ok"


def compare(body: dict[str, Any], index: int, data: str, books: Books) -> None:
    """The image must be the one that this request gave before, whoever made it."""
    names = ("prompt", "seed", "num_inference_steps", "guidance_scale")
    key = (*(body[name] for name in names), index)
    found = hashlib.sha256(data.encode()).hexdigest()
    if books.hashes.setdefault(key, found) != found:
        books.fault(f"{key} gave another image than before")
    books.images += 1


def judge(outcome: str, body: dict[str, Any], was_draining: bool, books: Books) -> None:
    allowed = {"ok", "left", "429"}
    if was_draining or (books.draining and outcome == "503"):
        allowed |= {"503", "no server"}
        allowed |= {outcome} if outcome.startswith("lost") else set()  # it had not begun
    if outcome not in allowed:
        books.fault(f"{body} → {outcome}")


async def watch_memory(process: subprocess.Popen[bytes], books: Books) -> None:
    """RSS of the server, and of its replicas on a cluster."""
    server = psutil.Process(process.pid)
    while not books.draining:
        for one in [server, *replicas(server)]:
            try:
                megabytes = one.memory_info().rss / 1e6
            except psutil.Error:
                continue
            books.memory.setdefault(one.pid, []).append(megabytes)
        await asyncio.sleep(_SECONDS_BETWEEN_SAMPLES)


def replicas(server: psutil.Process) -> list[psutil.Process]:
    """The replicas of a local cluster: its raylet is a child of the server."""
    return [child for child in server.children(recursive=True) if is_replica(child)]


def is_replica(process: psutil.Process) -> bool:
    try:
        return "ServeReplica" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def check_memory(books: Books, growth: float) -> dict[str, Any]:
    """Of every process that was there for the whole last three quarters."""
    told = {}
    longest = max(map(len, books.memory.values()))
    for pid, samples in books.memory.items():
        quarter = len(samples) // 4
        if quarter < 2:
            continue
        early = statistics.median(samples[quarter : 2 * quarter])
        late = statistics.median(samples[-quarter:])
        told[str(pid)] = {"early_mb": early, "late_mb": late, "samples": len(samples)}
        if len(samples) == longest and late > early * (1 + growth):
            books.fault(f"process {pid} grew from {early:.0f} to {late:.0f} MB")
    return told


async def check_rest(url: str, books: Books) -> None:
    """All clients pause: nothing may be left at hand."""
    books.paused = True
    async with httpx.AsyncClient(base_url=url) as http:
        for _ in range(600):
            text = (await http.get("/metrics")).text
            left = sum(float(n) for n in re.findall(r"^qdit_queue_images\{.*\} (\S+)$", text, re.M))
            if left == 0:
                break
            await asyncio.sleep(0.2)
        else:
            books.fault(f"{left:.0f} images are still at hand though nobody waits")
    books.paused = False


async def soak(options: argparse.Namespace, books: Books) -> None:
    with tempfile.TemporaryFile("w+") as log:
        process, url = start(options, log)
        server = psutil.Process(process.pid)
        clients = [
            asyncio.create_task(client(n, url, books, options.seed)) for n in range(options.clients)
        ]
        memory = asyncio.create_task(watch_memory(process, books))
        await asyncio.sleep(options.minutes * 30)
        if options.ray:
            victim = replicas(server)[0]
            print(f"killing replica {victim.pid}", file=sys.stderr, flush=True)
            victim.kill()
        await asyncio.sleep(options.minutes * 30)
        await check_rest(url, books)
        await asyncio.sleep(5)
        books.draining = True
        print("draining", file=sys.stderr, flush=True)
        process.send_signal(signal.SIGTERM)
        code = await asyncio.to_thread(process.wait, 120)
        if code != 0:
            books.fault(f"the server's exit code is {code}")
        await asyncio.gather(*clients, memory)


def main() -> None:
    options, books = parse(), Books()
    started = time.monotonic()
    asyncio.run(soak(options, books))
    told = {
        "minutes": round((time.monotonic() - started) / 60, 2),
        "outcomes": dict(books.outcomes),
        "images": books.images,
        "different_requests": len(books.hashes),
        "memory": check_memory(books, options.growth),
        "faults": books.faults,
    }
    print(json.dumps(told, indent=1))
    if options.json:
        options.json.write_text(json.dumps(told, indent=1))
    sys.exit(1 if books.faults else 0)


if __name__ == "__main__":
    main()
