"""What the report says of integer scales: against figures worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from qdit.calibrate.checkpoint import QuantizedCheckpoint
from qdit.calibrate.model import DiffusionModel
from qdit.calibrate.sampling import SamplingSettings
from qdit.engines.report.build import Proof, build_report
from qdit.engines.report.html import render
from qdit.engines.report.integer_scales import integer_scales_plot, integer_scales_text
from qdit.engines.report.schema import Report, read_report


@pytest.fixture(scope="module")
def integer_report(
    model: DiffusionModel, integer_checkpoint: QuantizedCheckpoint, proof: Proof
) -> Report:
    return build_report(
        model,
        integer_checkpoint,
        proof,
        SamplingSettings(4, 1.5, 7),
        command="qdit-export --scale-format integer",
        timings={},
        machine={},
        output=Path(),
    )


def plain(text: str) -> str:
    return text.replace("\u00a0", " ")


def changed(report: Report, **fields: Any) -> Report:
    """The report with every linear's `fields` replaced, and its summary made anew by hand."""
    value = report.model_dump(mode="json")
    for layer in value["plan"]["layers"]:
        layer |= fields
    value["integer_scales"] |= {key: item for key, item in fields.items() if "error" in key}
    return Report.model_validate(value)


def test_the_summary_is_over_the_linears_that_have_integer_scales(integer_report: Report) -> None:
    entry = integer_report.integer_scales
    assert entry is not None
    assert entry.linears == 2 * 6
    # hidden 64: five linears of K = 64 with 64 or 256 rows, one of K = 256 with 64
    small, large = 4 * 64 * 64 + 64 * 256, 256 * 64
    expected = (small * (4 + 4 / 32 + 16 / 64) + large * (4 + 4 / 32 + 16 / 256)) / (small + large)
    assert entry.effective_weight_bits == pytest.approx(expected)
    assert entry.float_scales_effective_weight_bits == 4 + 16 / 32
    # linears 1 … 6 and 8 … 13 of 14: the adaLN ones are first in each block
    squares = [(0.02 + 0.001 * number) ** 2 for number in range(14) if number % 7]
    assert entry.output_error == pytest.approx(math.sqrt(sum(squares) / 12))
    assert entry.float_scales_output_error == pytest.approx(0.025)
    assert entry.weight_error == pytest.approx(0.08)
    assert entry.float_scales_weight_error == pytest.approx(0.1)


def test_layers_say_both_errors_and_their_format(integer_report: Report) -> None:
    adaln, query = integer_report.plan.layers[:2]
    assert (adaln.scale_format, query.scale_format) == ("float", "integer")
    assert (adaln.float_scales_weight_error, adaln.float_scales_output_error) == (None, None)
    assert (query.float_scales_weight_error, query.float_scales_output_error) == (0.1, 0.025)
    assert query.scheme == "w4 g32 int · a8 token"
    assert query.bytes == 64 * 64 * (4 + 4 / 32 + 16 / 64) / 8


def test_the_parts_of_the_size_add_up(
    integer_report: Report, integer_checkpoint: QuantizedCheckpoint
) -> None:
    parts = integer_report.sizes.parts
    stored = integer_checkpoint.manifest.weights.bytes
    assert sum(parts.model_dump().values()) == integer_checkpoint.byte_size
    scales = sum(
        weight.multiplier.numel() / 2 + 2 * weight.channel_scale.numel()
        if weight.multiplier is not None
        else 2 * weight.scale.numel()
        for weight in integer_checkpoint.weights.values()
    )
    assert parts.scales_and_zero_points_bytes == scales < stored


def test_it_reads_back_equal(integer_report: Report, tmp_path: Path) -> None:
    integer_report.write(tmp_path / "report.json")
    assert read_report(tmp_path / "report.json") == integer_report


def test_a_report_from_before_scale_formats_reads_as_one_of_float_scales(
    report: Report, tmp_path: Path
) -> None:
    value = report.model_dump(mode="json")
    del value["integer_scales"]
    for layer in value["plan"]["layers"]:
        for key in ("scale_format", "float_scales_weight_error", "float_scales_output_error"):
            del layer[key]
    assert Report.model_validate(value) == report


def test_without_integer_scales_nothing_is_said(report: Report) -> None:
    assert report.integer_scales is None
    assert integer_scales_text(report) == ""
    assert integer_scales_plot(report) is None
    assert "Integer scales" not in render(report, None)


def test_the_page_says_what_they_save_and_cost(integer_report: Report) -> None:
    text = plain(integer_scales_text(integer_report))
    assert "12 linears have an integer of 1 to 16 as each group’s scale" in text
    # (32768·4.375 + 16384·4.1875) / 49152
    assert "4.312 bits a weight, where float scales of the same groups take 4.500" in text
    assert "output error on calibration inputs (root mean square) is 2.73 %; with float" in text
    assert "it would be 2.50 %" in text
    assert "weight error (root mean square) is 8.00 %; with float scales it would be 10.0 %" in text
    page = render(integer_report, None)
    assert "<h2>Integer scales</h2>" in page
    assert "Error against float scales" in page


def test_the_picture_shows_every_linear_by_its_output_error(integer_report: Report) -> None:
    drawn = integer_scales_plot(integer_report)
    assert drawn is not None
    # 0.021 and 0.033 against 0.025
    assert "output error" in drawn.alt and "for 12 linears" in drawn.alt
    assert "from −16.0 % to +32.0 %" in drawn.alt
    for name in ("q", "mlp in", "mlp out"):
        assert f">{name}</text>" in drawn.wide
    assert ">adaLN</text>" not in drawn.wide


def test_without_inputs_the_weights_errors_are_shown(integer_report: Report) -> None:
    made = changed(integer_report, output_error=None, float_scales_output_error=None)
    drawn = integer_scales_plot(made)
    assert drawn is not None
    assert "weight error" in drawn.alt
    text = plain(integer_scales_text(made))
    assert "calibration inputs" not in text
    assert "weight error" in text


def test_without_any_errors_there_is_no_picture(integer_report: Report) -> None:
    made = changed(
        integer_report,
        weight_error=None,
        output_error=None,
        float_scales_weight_error=None,
        float_scales_output_error=None,
    )
    assert integer_scales_plot(made) is None
    assert "take 4.500." in plain(integer_scales_text(made))
    page = render(made, None)
    assert "<h2>Integer scales</h2>" in page
    assert "Error against float scales" not in page


def test_a_linear_without_error_has_no_ratio_to_it(integer_report: Report) -> None:
    made = changed(integer_report, output_error=0.0, float_scales_output_error=0.0)
    drawn = integer_scales_plot(made)
    assert drawn is not None
    assert "weight error" in drawn.alt
