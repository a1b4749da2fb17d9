"""`qdit-bench`: prepare the targets' files, time them side by side, print, write JSON and plot."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, StepError
from ..progress import Progress
from .benchmark.plot import write_plot
from .benchmark.profile_view import print_profiles, write_profile_plot
from .benchmark.registry import HAS_CPU_KERNELS, IN_ONNX_RUNTIME, registrations
from .benchmark.results import BenchmarkResults, Row
from .benchmark.rounds import Schedule, measure
from .benchmark.subject import Subject
from .benchmark.subjects import ExportedSubject, open_subject
from .benchmark.table import failures, print_results
from .benchmark.target import RunSettings
from .devices import resolve_device
from .machine import describe_machine, load_average, usable_cores
from .options import SchemeOptions
from .session_settings import checked_kernels, parse_provider_options, parse_session_options

# A load average above this share of the cores means that other work takes part of them.
_BUSY = 0.5


def run_bench(
    source: str,
    scheme: SchemeOptions,
    *,
    targets: Sequence[str],
    batches: Sequence[int] = (1, 8),
    blocks: int | None = None,
    runs: int = 5,
    seconds: float = 10.0,
    threads: int | None = None,
    device: str = "auto",
    seed: int = 0,
    profile: bool = False,
    provider: str | None = None,
    session_options: Sequence[str] = (),
    provider_options: Sequence[str] = (),
    cpu_kernels: str = "auto",
    json_file: Path | None = None,
    command: str,
    progress: Progress,
) -> BenchmarkResults:
    """Time `targets` on `source` (an exported folder or a model source) and print the table.

    `json_file` gets the results and a plot of the same name with the suffix .svg; with `profile`
    also one of operators, .profile.svg. The JSON is written after each batch size, so that an
    interrupted run leaves what it has measured. Raises `InputError` for what cannot be asked for,
    `StepError` when no target could be timed.
    """
    chosen = registrations(targets)
    schedule = Schedule(tuple(sorted(set(batches))), runs, seconds, profile=profile)
    asked = provider or session_options or provider_options
    if asked and not set(targets) & set(IN_ONNX_RUNTIME):
        raise InputError(
            "--provider, --session-option and --provider-option are read by "
            f"{', '.join(IN_ONNX_RUNTIME)}, got "
            f"--targets {','.join(targets)}; add one or leave them out"
        )
    if cpu_kernels != "auto" and HAS_CPU_KERNELS not in targets:
        raise InputError(
            f"--cpu-kernels is read by {HAS_CPU_KERNELS}, got --targets {','.join(targets)}; add "
            "it or leave the flag out"
        )
    settings = RunSettings(
        resolve_device(device),
        threads or usable_cores(),
        provider,
        parse_session_options(session_options),
        parse_provider_options(provider_options),
        checked_kernels(cpu_kernels),
    )
    load = _check_load(settings, progress)
    with tempfile.TemporaryDirectory(prefix="qdit-bench-") as folder:
        work = Path(folder)
        subject = open_subject(
            source,
            scheme.plan_for,
            blocks=blocks,
            seed=seed,
            device=settings.device,
            work=work / "subject",
            progress=progress,
        )
        check_scheme_flags(subject, scheme)

        def results_of(rows: list[Row]) -> BenchmarkResults:
            return BenchmarkResults(
                machine=describe_machine(),
                command=command,
                rows=rows,
                settings=subject.facts() | _settings_json(schedule, settings, load),
            )

        def keep(rows: list[Row]) -> None:
            if json_file is not None:
                results_of(rows).write(json_file)

        rows = measure(chosen, subject, schedule, settings, work / "targets", progress, keep)
        results = results_of(rows)
    publish(results, json_file, progress)
    return results


def _check_load(settings: RunSettings, progress: Progress) -> float:
    load, cores = load_average(), usable_cores()
    if load > _BUSY * cores:
        progress.say(
            f"this machine is busy (load {load:.1f} on {cores} cores): latencies will be too high "
            "and their spread wide; ratios suffer less"
        )
    return load


def check_scheme_flags(subject: Subject, scheme: SchemeOptions) -> None:
    """An exported folder has its plan: flags that were given and differ from it are refused."""
    if not isinstance(subject, ExportedSubject):
        return
    bits = subject.facts()["plan"]["bits"]
    given = set(scheme.model_fields_set)
    if "bits" in given and scheme.bits == bits:
        given.remove("bits")
    if given:
        flags = ", ".join("--" + name.replace("_", "-") for name in sorted(given))
        raise InputError(
            f"{subject.folder} was exported with its own plan ({bits}), got {flags}; leave scheme "
            "flags out, or name the model instead of the folder"
        )


def publish(results: BenchmarkResults, json_file: Path | None, progress: Progress) -> None:
    """Print table and failures, draw the plots beside the JSON; fail when nothing was timed."""
    print_results(results)
    profiled = any(row.profile for row in results.rows)
    if results.settings.get("profile"):
        print_profiles(results)
    if json_file is not None:  # while it was measured
        progress.say(f"wrote {json_file}")
    if all(row.latency is None for row in results.rows):
        raise StepError(f"no target could be timed: {failures(results)[0]}")
    if json_file is not None:
        plot = json_file.with_suffix(".svg")
        write_plot(results, plot)
        progress.say(f"wrote {plot}")
    if json_file is not None and profiled:
        plot = json_file.with_suffix(".profile.svg")
        write_profile_plot(results, plot)
        progress.say(f"wrote {plot}")


def _settings_json(schedule: Schedule, settings: RunSettings, load: float) -> dict[str, Any]:
    return {
        "device": settings.device,
        "threads": settings.threads,
        "provider": settings.provider,
        "session_options": settings.session_options,
        "provider_options": settings.provider_options,
        "cpu_kernels": settings.cpu_kernels,
        "batches": list(schedule.batches),
        "least_runs": schedule.runs,
        "seconds_per_batch": schedule.seconds,
        "warm_up_runs": schedule.warm_up,
        "profile": schedule.profile,
        "load_average_before": load,
    }
