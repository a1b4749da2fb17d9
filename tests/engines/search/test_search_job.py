"""The search as a step of an export, on two blocks: what it chooses, keeps and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qdit.calibrate.checkpoint import QuantizedCheckpoint
from qdit.calibrate.model import DiffusionModel
from qdit.calibrate.plan import QuantizationPlan
from qdit.calibrate.search import sensitivity as sensitivity_module
from qdit.calibrate.sources import load_model
from qdit.engines.export_job import (
    Job,
    prepare,
    quantize_and_export,
    run_export,
    with_plan_found,
)
from qdit.engines.options import ExportOptions, ValidateOptions
from qdit.engines.report.schema import read_report
from qdit.engines.report.search_schema import SearchEntry, read_search
from qdit.engines.search.job import space_of
from qdit.engines.validate_job import run_validate
from qdit.engines.workspace import Workspace
from qdit.errors import InputError
from qdit.progress import Progress, Silent


@pytest.fixture(scope="module")
def model_folder(save_dit: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder: 2 blocks, hidden 64, 32×32×3 pixels in patches of 8."""
    return save_dit(tmp_path_factory.mktemp("model"), patch_size=8)


@pytest.fixture(scope="module")
def make_options(model_folder: Path) -> Callable[..., ExportOptions]:
    """A function (output, **changes) → options of a quick search on that model."""
    demo = load_model(None)

    def make(output: Path, **changes: Any) -> ExportOptions:
        values: dict[str, Any] = {
            "model": str(model_folder),
            "group_size": 32,
            "calib_samples": 8,
            "num_inference_steps": 3,
            "guidance_scale": 1.0,
            "fid_samples": 0,
            "device": "cpu",
            "output": output,
            "search": "sensitivity",
            "budget": "effective-bits=4.4",
            "search_refine": 1,
            "fid_features": demo.features,
            "reference": demo.reference,
        }
        return ExportOptions(**(values | changes))

    return make


class Counting(Silent):
    """Counts what is tracked, by description; raises at the `stop_at`-th item of `stop_in`."""

    def __init__(self, stop_in: str = "", stop_at: int = 0) -> None:
        self.counts: dict[str, int] = {}
        self._stop = (stop_in, stop_at)

    def track(
        self, items: Iterable[Any], description: str, total: int | None = None
    ) -> Iterator[Any]:
        for item in items:
            self.counts[description] = self.counts.get(description, 0) + 1
            if self._stop == (description, self.counts[description]):
                raise KeyboardInterrupt
            yield item


def find(options: ExportOptions, progress: Progress) -> None:
    """The search alone, as `quantize_and_export` begins."""
    model, plan = prepare(options, progress)
    assert options.output is not None
    workspace = Workspace(options.output, options.resume)
    with_plan_found(Job(options, model, plan, workspace, progress))


LEVELS = "sensitivity of each linear's weights"


def search_of(folder: Path) -> SearchEntry:
    entry = read_search(folder / "search.json")
    assert entry is not None
    return entry


def plan_of(folder: Path) -> QuantizationPlan:
    return QuantizationPlan.from_json(json.loads((folder / "plan.json").read_text()))


@pytest.fixture(scope="module")
def found(
    make_options: Callable[..., ExportOptions], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """One finished export with a search and a front (no test may change it)."""
    output = tmp_path_factory.mktemp("found") / "out"
    options = make_options(output, pareto=True, search_refine=2, search_images=4)
    quantize_and_export(options, Silent())
    return output


def test_the_found_plan_is_the_exported_one_and_within_the_budget(found: Path) -> None:
    plan, entry = plan_of(found), search_of(found)
    checkpoint = QuantizedCheckpoint.read(found)
    assert checkpoint.plan.digest == plan.digest
    bits = plan.effective_weight_bits(checkpoint.linears)
    assert bits <= 4.4
    assert entry.effective_weight_bits == pytest.approx(bits)
    assert entry.cost == pytest.approx(bits)


def test_a_finer_plan_would_have_been_over_the_budget(found: Path) -> None:
    """The budget is used up: 4.4 bits lie between uniform g32 (4.5) and g64 (4.25)."""
    assert search_of(found).effective_weight_bits > 4.3


def test_the_chosen_candidate_has_the_best_images(found: Path) -> None:
    entry = search_of(found)
    assert entry.images == 4
    assert len(entry.candidates) == 2
    assert entry.chosen is not None
    within = [
        own for own in entry.uniform if own.cost <= entry.budget.value and own.fid is not None
    ]
    bound = max(within, key=lambda own: own.cost).fid if within else None
    preferred = [
        own
        for own in entry.candidates
        if bound is None or (own.fid is not None and own.fid <= bound)
    ]
    allowed = preferred or entry.candidates
    assert entry.chosen.psnr_db == max(own.psnr_db for own in allowed if own.psnr_db)


def test_the_front_rises_and_its_plans_cost_what_they_say(found: Path) -> None:
    front = json.loads((found / "pareto.json").read_text())
    linears = QuantizedCheckpoint.read(found).linears
    points = front["points"]
    assert len(points) > 3
    quality = [point["predicted_psnr_db"] for point in points]
    assert quality == sorted(quality)
    for point in points:
        plan = QuantizationPlan.from_json(json.loads((found / point["plan"]).read_text()))
        plan.check(linears)
        assert plan.effective_weight_bits(linears) == pytest.approx(point["cost"])


def test_a_repeated_search_measures_nothing(
    found: Path, make_options: Callable[..., ExportOptions]
) -> None:
    progress = Counting()
    before = (found / "search.json").read_bytes()
    options = make_options(found, pareto=True, search_refine=2, search_images=4)
    quantize_and_export(options, progress)
    assert LEVELS not in progress.counts
    assert (found / "search.json").read_bytes() == before


def test_another_budget_reuses_what_was_measured(
    make_options: Callable[..., ExportOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    find(make_options(output), Silent())
    first = plan_of(output)

    def sampled(*arguments: Any, **options: Any) -> torch.Tensor:
        raise AssertionError("a kept measurement was made again")

    monkeypatch.setattr(sensitivity_module, "sample_images", sampled)
    find(make_options(output, budget="effective-bits=g64"), Silent())
    second = plan_of(output)
    assert second.digest != first.digest
    assert search_of(output).effective_weight_bits <= 4.25


def test_a_killed_search_goes_on_and_finds_the_same_plan(
    make_options: Callable[..., ExportOptions], tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    find(make_options(whole), Silent())
    with pytest.raises(KeyboardInterrupt):
        find(make_options(killed), Counting(LEVELS, 5))
    kept = json.loads((killed / ".work" / "search-parts" / "sensitivity.json").read_text())
    assert len(kept["errors"]) == 4
    find(make_options(killed), Silent())
    assert plan_of(killed).digest == plan_of(whole).digest


@pytest.mark.parametrize(
    "budget",
    ["effective-bits=g64", "bytes=g64", "bitops=g64", "latency-ms=1000", "bytes=255000"],
)
def test_every_kind_of_budget_is_kept(
    budget: str,
    make_options: Callable[..., ExportOptions],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QDIT_CACHE", str(tmp_path / "cache"))
    output = tmp_path / "out"
    work = quantize_and_export if budget.startswith("bytes") else find
    work(make_options(output, budget=budget), Silent())
    entry = search_of(output)
    assert entry.cost <= entry.budget.value * (1 + 1e-9)
    if budget.startswith("bytes"):
        assert QuantizedCheckpoint.read(output).byte_size <= entry.budget.value + 1024


@pytest.mark.parametrize("budget", ["effective-bits=g32", "bytes=g64"])
def test_a_search_among_integer_scales_keeps_its_budget(
    budget: str, make_options: Callable[..., ExportOptions], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    options = make_options(output, budget=budget, scale_format="integer")
    quantize_and_export(options, Silent())
    entry, checkpoint = search_of(output), QuantizedCheckpoint.read(output)
    for scheme in checkpoint.plan.layers.values():
        assert scheme.has_integer_scales == (scheme.weight_group != "channel")
    assert any(scheme.has_integer_scales for scheme in checkpoint.plan.layers.values())
    bits = checkpoint.plan.effective_weight_bits(checkpoint.linears)
    assert entry.effective_weight_bits == pytest.approx(bits)
    if budget == "bytes=g64":
        assert checkpoint.byte_size <= entry.budget.value + 1024
    else:
        # uniform g32: 4 + 4/32 + 16/K
        sizes = {s.name: s.weight_count for s in checkpoint.linears}
        expected = sum((4.125 + 16 / s.in_features) * sizes[s.name] for s in checkpoint.linears)
        assert entry.budget.value == pytest.approx(expected / sum(sizes.values()))
        assert bits <= entry.budget.value * (1 + 1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": "effective-bits=3.9"}, r"at least the cheapest plan's 4\.\d+ bits per weight"),
        ({"bits": "w16a16"}, "a search needs quantized weights, got --bits w16a16"),
        ({"budget": "speed=3"}, "a budget must be KIND=VALUE"),
        (
            {"budget": "latency-ms=3", "latency_target": "torch-quantized"},
            "torch-quantized is measured on cuda, got device cpu",
        ),
        ({"budget": "bytes=g48"}, "a uniform plan's budget must be one of"),
        (
            {"scale_format": "integer", "group_size": "channel"},
            "integer scales are those of weight groups, got --bits w4a8 --group-size channel",
        ),
    ],
    ids=["infeasible", "nothing to search", "kind", "device", "group", "scales without groups"],
)
def test_a_search_that_cannot_be_is_refused_before_anything_is_written(
    changes: dict[str, Any],
    message: str,
    make_options: Callable[..., ExportOptions],
    tmp_path: Path,
) -> None:
    output = tmp_path / "out"
    with pytest.raises(InputError, match=message):
        quantize_and_export(make_options(output, **changes), Silent())
    assert not output.exists()


def test_a_latency_budget_keeps_to_what_its_target_can_run(
    make_options: Callable[..., ExportOptions],
    make_model: Callable[..., DiffusionModel],
    tmp_path: Path,
) -> None:
    latency = {"budget": "latency-ms=9"}
    every, some = (
        groups_of_288(make_model, make_options(tmp_path, **latency, latency_target=target))
        for target in ("torch", "torch-quantized")
    )
    assert every - some == {144}


def test_a_search_keeps_to_what_the_targets_can_run(
    make_options: Callable[..., ExportOptions],
    make_model: Callable[..., DiffusionModel],
    tmp_path: Path,
) -> None:
    every, plugin, degraded, static = (
        groups_of_288(make_model, make_options(tmp_path, **flags))
        for flags in (
            {},
            {"target": "tensorrt-plugin"},
            {"target": "tensorrt-plugin", "on_unsupported": "degrade"},
            {"target": "onnxruntime,tensorrt-int8"},
        )
    )
    assert every == degraded
    assert every - plugin == {144}
    assert static == {"channel"}


def groups_of_288(make_model: Callable[..., DiffusionModel], options: ExportOptions) -> set[Any]:
    """The weight groups of attention's linears, with 288 inputs, in the space of these options."""
    model = make_model(num_attention_heads=2, attention_head_dim=144)
    name = next(spec.name for spec in model.linears if spec.name.endswith("to_q"))
    return set(space_of(options, model).weight_groups(name))


def test_the_paper_s_search_keeps_both_sides_of_a_linear_at_one_size(
    make_options: Callable[..., ExportOptions], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    options = make_options(
        output,
        search="evolutionary",
        search_refine=None,
        search_population=4,
        search_generations=2,
        search_images=4,
    )
    find(options, Silent())
    entry = search_of(output)
    assert [record.evaluated for record in entry.history] == [4, 8, 12]
    assert entry.effective_weight_bits <= 4.4
    for name, scheme in plan_of(output).layers.items():
        if scheme.quantizes_activations:
            pair = (scheme.weight_group, scheme.activation_group)
            assert pair[0] == pair[1] or pair == ("channel", "token"), name


def test_the_paper_s_search_needs_fid_files(
    make_options: Callable[..., ExportOptions], tmp_path: Path
) -> None:
    options = make_options(
        tmp_path / "out", search="evolutionary", fid_features=None, reference=None
    )
    with pytest.raises(InputError, match="the evolutionary search judges by FID"):
        find(options, Silent())


def test_report_and_validation_show_the_search_and_forget_it_with_the_plan(
    make_options: Callable[..., ExportOptions], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    options = make_options(output)
    run_export(options, "qdit-export …", Silent())
    written = read_report(output / "report.json").search
    assert written == search_of(output)
    assert "Granularity search" in (output / "report.html").read_text("utf-8")
    shared = options.model_dump(include=set(ValidateOptions.model_fields), exclude_unset=True)
    run_validate(output, ValidateOptions(**shared), None, "qdit-validate …", Silent())
    assert read_report(output / "report.json").search == written

    kept = {"search", "budget", "search_refine"}
    given = ExportOptions(**options.model_dump(exclude=kept, exclude_unset=True))
    run_export(given, "qdit-export …", Silent())
    assert read_report(output / "report.json").search is None
    assert not (output / "search.json").exists()
    assert (output / "plan.json").exists()  # --plan may name it
