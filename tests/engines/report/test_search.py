"""The record of a granularity search: search.json, the key in report.json, the page's section."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from qdit.calibrate.checkpoint import QuantizedCheckpoint
from qdit.calibrate.model import DiffusionModel
from qdit.calibrate.sampling import SamplingSettings
from qdit.engines.report.build import Proof, build_report
from qdit.engines.report.html import render
from qdit.engines.report.schema import Report, read_report
from qdit.engines.report.search_group_plot import group_plot
from qdit.engines.report.search_plots import front_plot, history_plot, search_plots
from qdit.engines.report.search_schema import SearchEntry, read_search
from qdit.engines.report.search_text import cost_text, plan_table, same_cost, sentences
from qdit.errors import ArtifactError

BUDGET = {
    "kind": "effective-bits",
    "given": "effective-bits=g128",
    "value": 4.125,
    "unit": "bits per weight",
}
SENSITIVITY: dict[str, Any] = {
    "method": "sensitivity",
    "budget": BUDGET,
    "cost": 4.12,
    "effective_weight_bits": 4.12,
    "predicted_mse": 0.016,
    "predicted_psnr_db": 24.0,
    "seconds": 200.0,
    "front": [
        {"cost": cost, "effective_weight_bits": cost, "predicted_psnr_db": psnr}
        for cost, psnr in ((4.02, 22.0), (4.12, 24.0), (4.5, 26.0))
    ],
    "uniform": [
        {
            "group": 32,
            "cost": 4.5,
            "effective_weight_bits": 4.5,
            "predicted_psnr_db": 25.25,
            "psnr_db": None,
            "fid": None,
        },
        {
            "group": 128,
            "cost": 4.125,
            "effective_weight_bits": 4.125,
            "predicted_psnr_db": 23.25,
            "psnr_db": 23.0,
            "fid": 5.75,
        },
    ],
    "candidates": [
        {
            "label": "solution 1",
            "cost": 4.12,
            "effective_weight_bits": 4.12,
            "predicted_psnr_db": 24.0,
            "psnr_db": 23.625,
            "fid": 5.5,
            "chosen": True,
        },
    ],
    "images": 64,
}
EVOLUTIONARY = SENSITIVITY | {
    "method": "evolutionary",
    "predicted_mse": None,
    "predicted_psnr_db": None,
    "front": [],
    "history": [
        {"generation": 0, "evaluated": 50, "seconds": 100.0, "best_fid": 6.0},
        {"generation": 1, "evaluated": 100, "seconds": 190.0, "best_fid": 5.5},
    ],
}


def search(**changes: Any) -> SearchEntry:
    return SearchEntry.model_validate_json(json.dumps(SENSITIVITY | changes))


def searched(report: Report, **changes: Any) -> Report:
    return report.model_copy(update={"search": search(**changes)})


def plain(text: str) -> str:
    return text.replace("\u00a0", " ")


@pytest.mark.parametrize("value", [SENSITIVITY, EVOLUTIONARY], ids=lambda value: value["method"])
def test_a_record_reads_back_equal_and_writes_equal_bytes(
    value: dict[str, Any], tmp_path: Path
) -> None:
    made = search(**value)
    path = tmp_path / "search.json"
    made.write(path)
    assert read_search(path) == made
    before = path.read_bytes()
    made.write(path)
    assert path.read_bytes() == before


def test_no_record_is_none(tmp_path: Path) -> None:
    assert read_search(tmp_path / "search.json") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "surprise: Extra inputs are not permitted; search again"),
        ({"method": "random"}, "method: Input should be 'sensitivity' or 'evolutionary'"),
        ({"budget": BUDGET | {"kind": "joules"}}, "budget.kind: Input should be"),
        ({"cost": float("inf")}, "cost: Input should be a finite number"),
        ({"front": SENSITIVITY["front"][::-1]}, "costs of the front must not fall"),
        ({"candidates": SENSITIVITY["candidates"] * 2}, "one candidate at most is chosen"),
        ({"images": 0}, "need the number of images, got 0"),
    ],
    ids=["unknown", "method", "kind", "infinite", "front", "two chosen", "no images"],
)
def test_malformed_records_are_refused_by_the_first_key(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "search.json"
    path.write_text(json.dumps(SENSITIVITY | change))
    with pytest.raises(ArtifactError, match=f"is not the record of a search: .*{message}"):
        read_search(path)


def test_a_report_holds_the_record(report: Report, tmp_path: Path) -> None:
    made = searched(report)
    made.write(tmp_path / "report.json")
    assert read_report(tmp_path / "report.json") == made
    assert json.loads((tmp_path / "report.json").read_text())["search"]["cost"] == 4.12


def test_the_record_is_handed_through_to_the_report(
    model: DiffusionModel, checkpoint: QuantizedCheckpoint, proof: Proof
) -> None:
    settings = SamplingSettings(4, 1.5, 7)
    facts: dict[str, Any] = {"command": "", "timings": {}, "machine": {}, "output": Path()}
    made = build_report(model, checkpoint, proof, settings, **facts, search=search())
    assert made.search == search()
    assert build_report(model, checkpoint, proof, settings, **facts).search is None


def test_reports_from_before_searches_read(report: Report, tmp_path: Path) -> None:
    value = report.model_dump(mode="json")
    assert value.pop("search") is None
    (tmp_path / "report.json").write_text(json.dumps(value))
    assert read_report(tmp_path / "report.json") == report


def test_the_section_is_there_with_a_search_alone(report: Report) -> None:
    assert "Granularity search" not in render(report, None)
    assert search_plots(report) == {}
    text = render(searched(report), None)
    assert text.count("<h2>Granularity search</h2>") == 1
    assert "Groups over depth" in text and "Quality against cost" in text
    assert "Best FID against time" not in text
    assert "Best FID against time" in render(searched(report, **EVOLUTIONARY), None)


def test_the_section_says_what_was_found_against_the_uniform_plan(report: Report) -> None:
    said = [plain(sentence) for sentence in sentences(searched(report), search())]
    assert said == [
        f"A weight group and an activation group for each of {len(report.plan.layers)} linears, "
        "chosen exactly from measured sensitivities within effective-bits=g128: at most "
        "4.125 bits per weight.",
        "The chosen plan: 4.120 bits per weight; predicted PSNR 24.00 dB; PSNR 23.62 dB and "
        "FID 5.500 measured on 64 image pairs.",
        # 24 − 23.25, 23.625 − 23 rounded half to even, 5.5 − 5.75
        "Against uniform g128, the costliest uniform plan within the budget (4.125): +0.75 dB "
        "predicted, +0.62 dB measured and −0.25 FID.",
        "The search took 3 min 20 s.",
    ]


def test_an_evolutionary_search_says_how_many_candidates_it_took(report: Report) -> None:
    said = sentences(report, search(**EVOLUTIONARY))
    assert plain(said[-1]) == "The search took 3 min 20 s over 100 candidates."
    assert "predicted" not in " ".join(said)


@pytest.mark.parametrize(
    ("value", "group"),
    [(4.125, 128), (4.4, 128), (4.5, 32), (9.0, 32), (4.1, None)],
    ids=["exact", "between", "finer", "above all", "below all"],
)
def test_the_uniform_plan_to_compare_with_is_the_costliest_within_the_budget(
    report: Report, value: float, group: int | None
) -> None:
    made = search(budget=BUDGET | {"value": value})
    found = same_cost(made)
    assert (found.group if found else None) == group
    assert ("No uniform plan lies within" in " ".join(sentences(report, made))) == (group is None)


@pytest.mark.parametrize(
    ("kind", "unit", "value", "expected"),
    [
        ("effective-bits", "bits per weight", 4.125, "4.125 bits per weight"),
        ("bytes", "bytes", 6012345.0, "6.012 MB"),
        ("bitops", "bit operations per image", 3.1e12, "3.100 × 10¹² bit operations per image"),
        ("latency-ms", "ms", 12.345, "12.35 ms"),
    ],
)
def test_costs_are_shown_in_readable_units(
    kind: str, unit: str, value: float, expected: str
) -> None:
    made = search(budget={"kind": kind, "given": "", "value": value, "unit": unit})
    assert plain(cost_text(value, made.budget)) == expected


def test_the_table_leaves_out_columns_without_figures() -> None:
    table = plan_table(search())
    assert table.columns == (
        "Cost, bits per weight",
        "Predicted PSNR, dB",
        "PSNR, dB",
        "FID",
    )
    assert [(row.name, row.chosen) for row in table.rows] == [
        ("solution 1", True),
        ("uniform g32", False),
        ("uniform g128", False),
    ]
    assert table.rows[1].cells == ("4.500", "25.25", "–", "–")
    bare = plan_table(search(candidates=[], uniform=[], images=0))
    assert bare.columns == ("Cost, bits per weight", "Predicted PSNR, dB")
    assert [(row.name, row.chosen) for row in bare.rows] == [("chosen plan", True)]


def cells(drawn: str, side: str) -> list[str]:
    """The linears that have a cell in one panel."""
    return re.findall(rf'id="groups-\w+-{side}-group\.([^"]+)"', drawn)


@pytest.mark.parametrize("blocks", [2, 8, 28])
def test_the_picture_has_one_cell_a_linear_and_panel(report: Report, blocks: int) -> None:
    layers = [
        layer.model_copy(
            update={"block": block, "name": layer.name.replace(".0.", f".{block}.", 1)}
        )
        for block in range(blocks)
        for layer in report.plan.layers
        if layer.block == 0
    ]
    found = group_plot(layers)
    assert found is not None and len(layers) == 7 * blocks
    for drawn in (found.wide, found.narrow):
        for side in ("weight", "activation"):
            assert sorted(cells(drawn, side)) == sorted(layer.name for layer in layers)
        # a size in every cell and one in the legend; adaLN's input is not quantized
        assert drawn.count(">32</text>") == 7 * blocks + 6 * blocks + 1
        assert drawn.count(">–</text>") == blocks
        assert "#0" not in drawn


def test_groups_are_named_and_finer_ones_stronger(report: Report) -> None:
    groups: list[int | str] = [32, 64, "channel"]
    layers = [
        layer.model_copy(
            update={"weight_group": group, "activation_bits": 16, "activation_group": "token"}
        )
        for layer, group in zip(report.plan.layers, groups, strict=False)
    ]
    found = group_plot(layers)
    assert found is not None
    assert found.alt == "Weight groups of 3 linears: 32 in 1, 64 in 1, channel in 1."
    assert cells(found.wide, "weight") and not cells(found.wide, "activation")
    style = r'-weight-group\.{}">\s*<path [^>]*fill: var\(--first\)(?:; fill-opacity: ([\d.]+))?'
    opacities = [
        float(re.findall(style.format(re.escape(layer.name)), found.wide)[0] or 1)
        for layer in layers
    ]
    assert opacities == sorted(opacities, reverse=True) and len(set(opacities)) == 3


def test_a_linear_left_at_16_bits_has_an_empty_cell(report: Report) -> None:
    layers = report.plan.layers[:3]
    assert [layer.activation_bits for layer in layers] == [16, 8, 8]
    found = group_plot(layers)
    assert found is not None
    assert len(cells(found.wide, "activation")) == 3
    assert found.wide.count(">–</text>") == 1
    assert "Activation groups of 2 linears: 32 in 2." in found.alt


def test_a_plan_that_quantizes_nothing_has_no_picture(report: Report) -> None:
    layers = [
        layer.model_copy(update={"weight_bits": 16, "activation_bits": 16})
        for layer in report.plan.layers
    ]
    assert group_plot(layers) is None


def test_the_front_shows_predicted_and_measured_plans_apart() -> None:
    found = front_plot(search())
    assert found is not None
    for label in ("front", "uniform plans", "chosen plan", "uniform plans, measured", "g128"):
        assert f">{label}</text>" in found.wide
    assert "candidates, measured" not in found.wide  # the chosen one is the only candidate
    assert "Pareto front of 3 plans, from 4.020" in found.alt


def test_figures_that_are_null_are_left_out_and_break_nothing(report: Report) -> None:
    nothing = {"psnr_db": None, "fid": None, "predicted_psnr_db": None}
    empty = EVOLUTIONARY | {
        "uniform": [plan | nothing | {"cost": None} for plan in SENSITIVITY["uniform"]],
        "candidates": [plan | nothing for plan in SENSITIVITY["candidates"]],
        "front": [point | {"predicted_psnr_db": None} for point in SENSITIVITY["front"]],
        "history": [entry | {"best_fid": None} for entry in EVOLUTIONARY["history"]],
    }
    made = searched(report, **empty)
    assert set(search_plots(made)) == {"groups"}
    assert "Granularity search" in render(made, None)
    assert plan_table(search(**empty)).columns == ("Cost, bits per weight",)


def test_the_history_is_drawn_over_time() -> None:
    found = history_plot(search(**EVOLUTIONARY))
    assert found is not None and history_plot(search()) is None
    assert plain(found.alt) == (
        "Best FID over 2 generations: 6.00 after 1 min 40 s, 5.50 after 3 min 10 s and 100 "
        "candidates."
    )
    assert ">seconds</text>" in found.wide
