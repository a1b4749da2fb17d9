"""Processor time of one denoiser call on one thread, target by target: ratios on a busy machine.

`qdit-bench` measures latency, which other work on the machine lengthens. Processor time hardly
knows of it. All targets live in this one process and take turns; the median of the rounds counts.

    python benchmarks/processor_time.py --blocks 4 --batch 1 --targets fp32,onnxruntime,ort-dynamic

The scheme flags are those of `qdit-bench`, as KEY=VALUE: --scheme scale_format=integer.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from qdit.engines.benchmark.registry import registrations
from qdit.engines.benchmark.subjects import open_subject
from qdit.engines.benchmark.target import Runner, RunSettings
from qdit.engines.machine import describe_machine
from qdit.engines.options import SchemeOptions, build_options
from qdit.errors import QditError
from qdit.files import write_json
from qdit.progress import Silent


def main() -> None:
    arguments = _arguments()
    scheme = build_options(SchemeOptions, dict(map(_pair, arguments.scheme)))
    chosen = registrations(arguments.targets.split(","))
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        subject = open_subject(
            arguments.source,
            scheme.plan_for,
            blocks=arguments.blocks,
            seed=0,
            device="cpu",
            work=work / "subject",
            progress=Silent(),
        )
        runners: dict[str, Runner] = {}
        for registration in sorted(chosen, key=lambda found: found.quantized):
            target, own = registration.load(), work / registration.name
            own.mkdir(parents=True)
            try:
                runner = target.load(target.prepare(subject, own), RunSettings("cpu", 1))
                runner.bind(subject.inputs(arguments.batch))
                runner.run()
            except QditError as error:
                print(f"{registration.name}: {error}")
                continue
            runners[registration.name] = runner
        for _ in range(arguments.rounds):
            for name, runner in runners.items():
                times.setdefault(name, []).append(_seconds(runner))
    _report(arguments, times)


def _seconds(runner: Runner) -> float:
    runner.run()  # the other targets' turns have emptied the caches
    started = time.process_time()
    runner.run()
    return time.process_time() - started


def _report(arguments: argparse.Namespace, times: dict[str, list[float]]) -> None:
    medians = {name: 1000 * statistics.median(values) for name, values in times.items()}
    first = medians[arguments.targets.split(",")[0]]
    print(describe_machine()["summary"])
    for name, median in medians.items():
        low, high = 1000 * min(times[name]), 1000 * max(times[name])
        print(f"{name:16s} {median:8.1f} ms ({low:.1f} … {high:.1f})  {first / median:.2f} ×")
    if arguments.json is not None:
        write_json(arguments.json, {"settings": vars(arguments) | {"json": None}, "ms": medians})


def _pair(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    return key, int(value) if value.isdigit() else value


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="?", default="random:DiT-XL/2")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--targets", default="fp32,onnxruntime,ort-dynamic,openvino-int8")
    parser.add_argument("--scheme", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
