"""The same results from every executor, and what a dying or failing worker costs."""

from __future__ import annotations

import builtins
import os
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import psutil
import pytest

from qdit.calibrate.plan import QuantizationPlan
from qdit.calibrate.sampling import SamplingSettings
from qdit.calibrate.search.executors import make_executor, process_devices
from qdit.calibrate.search.executors.processes import ProcessExecutor
from qdit.calibrate.search.executors.ray_cluster import RayExecutor
from qdit.calibrate.search.fitness import CandidateFailure, Fitness, Outcome
from qdit.calibrate.search.payload import EvaluatorPayload
from qdit.errors import InputError, StepError

PLANS = 6
Results = dict[str, Outcome]


def results(pairs: Iterator[tuple[QuantizationPlan, Outcome]]) -> Results:
    return {plan.digest: outcome for plan, outcome in pairs}


@pytest.fixture(scope="module")
def payload(tiny: Any) -> EvaluatorPayload:
    """With enough steps that a worker can be killed in the middle of a candidate."""
    settings = replace(tiny.payload.settings, sampling=SamplingSettings(25, 1.0, 7))
    return replace(tiny.payload, settings=settings)


@pytest.fixture(scope="module")
def expected(tiny: Any, payload: EvaluatorPayload) -> Results:
    """What the evaluator gives in this process, one plan after the other."""
    with closing(make_executor("serial", payload)) as executor:
        found = results(executor.evaluate(tiny.plans(PLANS)))
    fids = {outcome.fid for outcome in found.values() if isinstance(outcome, Fitness)}
    assert len(fids) == PLANS, found  # they can be told apart
    return found


@contextmanager
def none_left(mark: str) -> Iterator[None]:
    """No process with `mark` in its command line is left a moment after this."""
    yield
    children = psutil.Process().children(recursive=True)
    marked = [child for child in children if mark in " ".join(child.cmdline())]
    _, alive = psutil.wait_procs(marked, timeout=20)
    assert not alive


@pytest.fixture(scope="module")
def two_processes(payload: EvaluatorPayload) -> Iterator[ProcessExecutor]:
    with none_left("spawn_main"), closing(ProcessExecutor(payload, ["cpu", "cpu"])) as executor:
        yield executor


@pytest.fixture(scope="module")
def two_actors(payload: EvaluatorPayload) -> Iterator[RayExecutor]:
    """A local Ray cluster of two workers."""
    pytest.importorskip("ray", reason="qdit[cluster] is not installed")
    with none_left("ray"), closing(RayExecutor(payload, workers=2)) as executor:
        yield executor


EXECUTORS = ["two_processes", pytest.param("two_actors", marks=pytest.mark.slow)]


@pytest.fixture
def executor(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("executor", EXECUTORS, indirect=True)
class TestWorkers:
    def test_they_give_what_one_process_gives(
        self, tiny: Any, executor: Any, expected: Results
    ) -> None:
        assert results(executor.evaluate(tiny.plans(PLANS))) == expected
        assert executor.workers == 2

    def test_a_worker_killed_at_work_costs_nothing_but_its_attempt(
        self, tiny: Any, executor: Any, expected: Results
    ) -> None:
        deaths, pairs = executor.deaths, executor.evaluate(tiny.plans(PLANS))
        first_two = [next(pairs), next(pairs)]  # whoever gave the first is at its next plan now
        busy = {n: pid for n, pid in executor.processes.items() if n not in executor.idle()}
        number, process = busy.popitem()
        os.kill(process, signal.SIGKILL)
        assert results(iter([*first_two, *pairs])) == expected
        assert executor.deaths == deaths + 1
        assert executor.workers == 2
        assert number not in executor.processes

    def test_a_plan_that_breaks_is_reported_and_the_others_go_on(
        self, tiny: Any, executor: Any, expected: Results
    ) -> None:
        good = tiny.plans(PLANS)
        name = tiny.space.linears[1].name
        unknown = replace(good[0][name], weight_group=32, activation_group=384)
        broken = QuantizationPlan("w4a8", {**good[0].layers, name: unknown})
        found = results(executor.evaluate([broken, *good]))
        failure = found.pop(broken.digest)
        assert isinstance(failure, CandidateFailure)
        assert failure.reason
        assert found == expected

    def test_an_evaluation_left_half_way_does_not_disturb_the_next(
        self, tiny: Any, executor: Any, expected: Results
    ) -> None:
        plans = tiny.plans(PLANS)
        next(executor.evaluate(plans))
        assert results(executor.evaluate(plans)) == expected


def test_a_payload_that_cannot_be_built_is_no_candidates_fault(tiny: Any) -> None:
    broken = replace(tiny.payload, features_file=b"not a network")
    with (
        closing(ProcessExecutor(broken, ["cpu"])) as executor,
        pytest.raises(StepError, match=r"could not start: ArtifactError: .*not a loadable ONNX"),
    ):
        list(executor.evaluate(tiny.plans(1)))


def test_without_ray_the_message_says_what_to_install(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without_ray(name: str, *rest: Any, **named: Any) -> Any:
        if name == "ray":
            raise ImportError("No module named 'ray'")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without_ray)
    with pytest.raises(InputError, match=r"pip install qdit\[cluster\]"):
        make_executor("ray", tiny.payload)


@pytest.mark.parametrize("kind", ["serial", "processes", "ray"])
def test_nothing_is_built_before_the_first_plan(tiny: Any, kind: Any) -> None:
    unbuildable = replace(tiny.payload, features_file=b"not a network")
    with closing(make_executor(kind, unbuildable, workers=1)) as executor:
        assert not getattr(executor, "processes", {})


def test_unknown_executors_and_numbers_are_refused(tiny: Any) -> None:
    with pytest.raises(InputError, match="one of serial, processes, ray, got 'threads'"):
        make_executor("threads", tiny.payload)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least 1, got 0"):
        process_devices("cpu", 0)
    with pytest.raises(InputError, match="at least 1, got 0"):
        RayExecutor(tiny.payload, workers=0)


@pytest.mark.parametrize(
    ("gpus", "device", "workers", "devices"),
    [
        (4, "cuda", None, ("cuda:0", "cuda:1", "cuda:2", "cuda:3")),
        (4, "cuda", 2, ("cuda:0", "cuda:1")),
        (4, "cuda:3", None, ("cuda:3",)),
        (0, "cpu", None, ("cpu",)),
        (0, "cpu", 3, ("cpu", "cpu", "cpu")),
    ],
    ids=["all-gpus", "two-gpus", "one-gpu", "one-cpu", "three-cpu"],
)
def test_the_devices_of_processes(
    monkeypatch: pytest.MonkeyPatch,
    gpus: int,
    device: str,
    workers: int | None,
    devices: tuple[str, ...],
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert process_devices(device, workers) == devices


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(InputError, match="no CUDA device is visible; use --device cpu"):
        process_devices("cuda")
