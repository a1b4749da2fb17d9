"""`qdit-serve` under load: step-mixed batching against whole trajectories and one at a time.

    python benchmarks/serve_load.py build/demo --users 64 --rounds 2 --json load.json

Locust's users ask for one image after another, with no pause, of 5 … 50 steps and with or without
guidance. Every policy is the real server in a process of its own, with the same rows a call; all
are started side by side before anything is timed, and idle while another one is watched. One is
watched while it serves --rows rows after --warmup rows, each for at most --seconds; the engine
alone, in one more process, is timed right before and after: other work on the machine slows both,
and CPU time sees less of that than the clock. Rows a second, and the share of time that was spent
in engine calls, come from the server's own counters; latencies from Locust. Each stage is told as
it ends.

'Short' requests are those of at most --short steps. Latencies are of the requests that ended while
their server was watched, of all rounds together. The users' seeds are the same for each policy.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO

# locust makes this process's sockets cooperative as it is imported: torch stays in others
import psutil
from locust import FastHttpUser, events, task
from locust.env import Environment

POLICIES = ("step-mixed", "whole-trajectory", "single")
STEPS = (5, 50)
GUIDANCE = (1.0, 1.5)
_START_SECONDS = 180
_STOP_SECONDS = 30
_STARTED = time.monotonic()
_PATIENCE = 60  # seconds without a row served


@dataclass
class Window:
    """What was seen between two moments. `latencies`: (steps, seconds) of ended requests;
    `busy`: seconds in engine calls; `cpu`: seconds of the server's process; `alone` and
    `alone_by_cpu`: rows a second, and a CPU second, of the engine alone at about that time.
    """

    policy: str
    seconds: float = 0.0
    rows: float = 0.0
    calls: float = 0.0
    busy: float = 0.0
    cpu: float = 0.0
    alone: float = 0.0
    alone_by_cpu: float = 0.0
    statuses: dict[int, int] = field(default_factory=dict)
    latencies: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """One policy over all rounds: seconds, and rows a second."""

    policy: str
    rows_per_second: float
    of_the_engine: float
    of_the_engine_by_cpu: float
    busy: float
    images_per_second: float
    rows_per_call: float
    short_p50: float
    short_p95: float
    long_p50: float
    long_p95: float
    all_p50: float
    all_p95: float
    requests: int
    failures: int


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="what qdit-export wrote")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads of the engine")
    parser.add_argument("--max-batch", type=int, default=8, help="rows a call, for every policy")
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=2700, help="rows: 64 users' requests once")
    parser.add_argument("--rows", type=int, default=5400)
    parser.add_argument("--seconds", type=float, default=600, help="at most, of each")
    parser.add_argument("--seconds-alone", type=float, default=10, help="of the engine, each time")
    parser.add_argument("--short", type=int, default=10)
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--engine-alone", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


@dataclass
class Alone:
    """The engine in a process of its own, which waits to be asked."""

    process: subprocess.Popen[str]

    def time(self) -> tuple[float, float]:
        """Rows a second, and a CPU second, at the benchmark's batch size."""
        asked, answers = self.process.stdin, self.process.stdout
        if asked is None or answers is None:
            raise RuntimeError("the engine's process must have pipes")
        asked.write("\n")
        asked.flush()
        answer = answers.readline()
        if not answer:
            raise RuntimeError("the engine alone failed; its error is above")
        by_time, by_cpu = answer.split()
        return float(by_time), float(by_cpu)


@contextmanager
def engine_process(options: argparse.Namespace) -> Iterator[Alone]:
    """Started, perhaps not ready yet."""
    command = [sys.executable, __file__, str(options.folder), "--engine-alone"]
    command += [*_engine_flags(options), "--seconds-alone", str(options.seconds_alone)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield Alone(process)
        finally:
            process.terminate()


def _engine_flags(options: argparse.Namespace) -> list[str]:
    flags = ["--engine", options.engine, "--device", options.device]
    flags += ["--max-batch", str(options.max_batch)]
    return [*flags, "--threads", str(options.threads)] if options.threads else flags


def engine_alone(options: argparse.Namespace) -> None:
    """For each line of stdin: rows a second (the median) and a CPU second of bare engine calls."""
    import torch

    from qdit.calibrate.sampling import initial_noise
    from qdit.engines.kinds.kind import EngineSettings
    from qdit.serve.served_model import load_served

    settings = EngineSettings(options.device, options.threads)
    served = load_served(options.folder, options.engine, settings, None, lambda message: None)
    rows = options.max_batch
    x = initial_noise(range(rows), served.sampled.sample_shape, seed=0)
    timesteps, labels = torch.arange(rows) * 97 % 1000, torch.arange(rows) % 10
    for _ in sys.stdin:
        served.engine.denoise(x, timesteps, labels)
        times: list[float] = []
        cpu = time.process_time()
        while sum(times) < options.seconds_alone:
            started = time.perf_counter()
            served.engine.denoise(x, timesteps, labels)
            times.append(time.perf_counter() - started)
        cpu = time.process_time() - cpu
        print(rows / statistics.median(times), rows * len(times) / cpu, flush=True)


@dataclass(frozen=True)
class Server:
    """A server that was started, perhaps not ready yet."""

    policy: str
    process: subprocess.Popen[bytes]
    log: IO[str]

    def url(self) -> str:
        """The address that it says it serves at, once it does."""
        until = time.monotonic() + _START_SECONDS
        while self.process.poll() is None and time.monotonic() < until:
            if found := re.search(r"serving .* at (http://\S+)", self.logged()):
                return found[1]
            time.sleep(0.2)
        raise RuntimeError(f"the server did not start:\n{self.logged()}")

    def logged(self) -> str:
        self.log.seek(0)
        return self.log.read()


@contextmanager
def serving(options: argparse.Namespace, policy: str) -> Iterator[Server]:
    """A fresh server."""
    command = [sys.executable, "-c", "from qdit.cli import serve_command; serve_command()"]
    command += [str(options.folder), "--port", "0", "--batching", policy]
    command += [*_engine_flags(options), "--max-queue", str(4 * options.users)]
    command += ["--request-timeout", "3600", "--drain-seconds", "0"]
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            yield Server(policy, process, log)
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                say(f"the {policy} server did not stop in {_STOP_SECONDS} s and is killed")
                process.kill()


def user_class(seed: int, window: Window) -> type[FastHttpUser]:
    """Users that note into `window` what they were answered."""
    numbers = iter(range(1_000_000))

    class Asker(FastHttpUser):
        network_timeout = connection_timeout = 3600.0

        def on_start(self) -> None:
            self.chance = random.Random(f"{seed} {next(numbers)}")

        @task
        def ask(self) -> None:
            steps = self.chance.randint(*STEPS)
            body = {
                "prompt": str(self.chance.randrange(10)),
                "num_inference_steps": steps,
                "guidance_scale": self.chance.choice(GUIDANCE),
                "seed": self.chance.randrange(2**31),
            }
            started = time.monotonic()
            answer = self.client.post("/v1/images/generations", json=body, name=f"{steps:02d}")
            window.statuses[answer.status_code] = window.statuses.get(answer.status_code, 0) + 1
            if answer.status_code == 200:
                window.latencies.append((steps, time.monotonic() - started))

    return Asker


def run_policy(options: argparse.Namespace, server: Server, seed: int) -> Window:
    """Warm up, then watch for a while; users that are waiting at the end are stopped."""
    window, url = Window(server.policy), server.url()
    process = psutil.Process(server.process.pid)
    environment = Environment(
        user_classes=[user_class(seed, window)], events=events, host=url, stop_timeout=0
    )
    runner = environment.create_local_runner()
    runner.start(options.users, spawn_rate=options.users)
    try:
        warm = _counters(url)["rows"] + options.warmup
        before = _counters_at(server, url, warm, options.seconds, window)
        started, cpu = time.monotonic(), process.cpu_times()
        say(f"{server.policy}: warm, {before['rows']:.0f} rows served")
        window.statuses.clear()
        window.latencies.clear()
        after = _counters_at(server, url, before["rows"] + options.rows, options.seconds, window)
        seconds, ended = time.monotonic() - started, process.cpu_times()
        found = replace(
            window,
            seconds=seconds,
            cpu=ended.user + ended.system - cpu.user - cpu.system,
            statuses=dict(window.statuses),
            latencies=list(window.latencies),
            **{name: after[name] - before[name] for name in ("rows", "calls", "busy")},
        )
    finally:
        runner.quit()
    _wait_until_idle(url)
    return found


def _counters_at(
    server: Server, url: str, rows: float, seconds: float, window: Window
) -> dict[str, float]:
    """The counters once the server has served so many rows, or after so many seconds."""
    import gevent

    until = time.monotonic() + seconds
    found, moved = _counters(url), time.monotonic()
    while found["rows"] < rows and time.monotonic() < until:
        gevent.sleep(0.25)
        now = _counters(url)
        if now["rows"] > found["rows"]:
            moved = time.monotonic()
        elif time.monotonic() - moved > _PATIENCE:
            raise RuntimeError(
                f"the {server.policy} server served no row in {_PATIENCE} s; answers so far "
                f"{window.statuses}; its log ends\n{server.logged()[-2000:]}"
            )
        found = now
    return found


def _wait_until_idle(url: str) -> None:
    """Until what the users left behind is dropped: the next server is not to be watched beside."""
    until = time.monotonic() + _STOP_SECONDS
    while _counters(url)["waiting"] and time.monotonic() < until:
        time.sleep(0.1)


def _counters(url: str) -> dict[str, float]:
    import urllib.request

    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    names = {
        "rows": r'^qdit_engine_rows_total\{kind="served",.*\} (\S+)$',
        "calls": r"^qdit_engine_call_seconds_count\{.*\} (\S+)$",
        "busy": r"^qdit_engine_call_seconds_sum\{.*\} (\S+)$",
        "waiting": r"^qdit_queue_images\{.*\} (\S+)$",
    }
    found = {name: re.search(pattern, text, re.M) for name, pattern in names.items()}
    return {name: float(match[1]) if match else 0.0 for name, match in found.items()}


def percentile(values: list[float], share: float) -> float:
    """By the nearest rank; NaN of nothing."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def summary(policy: str, windows: list[Window], short: int) -> Row:
    """All rounds together; throughput against the engine alone: the median of the rounds."""
    seconds = sum(w.seconds for w in windows)
    answered = [latency for w in windows for latency in w.latencies]
    shorts = [taken for steps, taken in answered if steps <= short]
    longs = [taken for steps, taken in answered if steps > short]
    both = shorts + longs
    return Row(
        policy,
        sum(w.rows for w in windows) / seconds,
        statistics.median(w.rows / w.seconds / w.alone for w in windows),
        statistics.median(w.rows / w.cpu / w.alone_by_cpu for w in windows),
        sum(w.busy for w in windows) / seconds,
        len(answered) / seconds,
        sum(w.rows for w in windows) / max(sum(w.calls for w in windows), 1),
        *(percentile(values, share) for values in (shorts, longs, both) for share in (0.5, 0.95)),
        sum(sum(w.statuses.values()) for w in windows),
        sum(count for w in windows for status, count in w.statuses.items() if status != 200),
    )


def table(rows: list[Row], short: int) -> str:
    """Markdown."""
    lines = [
        f"| batching | rows/s | of the engine's own, by CPU time | in calls | images/s "
        f"| rows a call | ≤ {short} steps: p50, p95 s | longer: p50, p95 s | all: p50, p95 s "
        "| requests, failed |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.policy} | {r.rows_per_second:.1f} | {r.of_the_engine:.2f}, "
        f"{r.of_the_engine_by_cpu:.2f} | {r.busy:.2f} | "
        f"{r.images_per_second:.2f} | {r.rows_per_call:.1f} | {r.short_p50:.1f}, "
        f"{r.short_p95:.1f} | {r.long_p50:.1f}, {r.long_p95:.1f} | {r.all_p50:.1f}, "
        f"{r.all_p95:.1f} | {r.requests}, {r.failures} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    options = parse()
    if options.engine_alone:
        engine_alone(options)
        return
    policies = options.policies.split(",")
    windows: dict[str, list[Window]] = {policy: [] for policy in policies}
    with ExitStack() as stack:
        alone = stack.enter_context(engine_process(options))
        servers = [stack.enter_context(serving(options, policy)) for policy in policies]
        for server in servers:
            say(f"{server.policy} serves at {server.url()}")
        for number in range(options.rounds):
            before = alone.time()
            say(f"round {number + 1}: the engine alone, {before[0]:.1f} rows/s")
            for server in servers:
                found = run_policy(options, server, options.seed + number)
                told = f"{found.rows / found.seconds:.1f} rows/s in {found.seconds:.1f} s"
                say(f"round {number + 1}: {server.policy} {told}, {found.statuses}")
                after = alone.time()
                mean, by_cpu = (sum(pair) / 2 for pair in zip(before, after, strict=True))
                found = replace(found, alone=mean, alone_by_cpu=by_cpu)
                windows[server.policy].append(found)
                before = after
                say(f"round {number + 1}: the engine alone, {after[0]:.1f} rows/s")
                _write(options, windows)
    rows = [summary(policy, windows[policy], options.short) for policy in policies]
    print(f"{options.users} users, at most {options.max_batch} rows a call\n")
    print(table(rows, options.short))


def say(message: str) -> None:
    """To stderr with the seconds since the start: an unfinished run shows where the time went."""
    seconds = time.monotonic() - _STARTED
    print(f"[{seconds:5.1f} s] {message}", file=sys.stderr, flush=True)


def _write(options: argparse.Namespace, windows: dict[str, list[Window]]) -> None:
    if options.json is None:
        return
    policies = {name: found for name, found in windows.items() if found}
    told = {
        "rows": [asdict(summary(name, found, options.short)) for name, found in policies.items()],
        "windows": [asdict(w) for found in policies.values() for w in found],
    }
    options.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
