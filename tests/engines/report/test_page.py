"""report.html: self-contained, well formed, escaped, and honest about what was not run."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from qdit.engines.report.grid import make_samples
from qdit.engines.report.html import render
from qdit.engines.report.plots import all_plots
from qdit.engines.report.schema import Report
from qdit.engines.report.write import write_report
from qdit.errors import InputError

VOID = {"meta", "img", "br", "path", "use"}


class Page(HTMLParser):
    """Checks that tags nest, and collects what a test asks about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
            self.open.pop()

    def attributes(self, name: str) -> list[str]:
        return [str(attrs[name]) for _, attrs in self.tags if name in attrs]


def changed(report: Report, **parts: dict[str, Any]) -> Report:
    """The report with keys of its parts replaced."""
    value = report.model_dump(mode="json")
    for part, keys in parts.items():
        value[part] |= keys
    return Report.model_validate(value)


@pytest.fixture(scope="session")
def images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    full = torch.rand(4, 3, 8, 8, generator=generator) * 2 - 1
    return full, (full + 0.01).clamp(-1, 1)


@pytest.fixture(scope="session")
def text(report: Report, images: tuple[torch.Tensor, torch.Tensor]) -> str:
    return render(report, make_samples(*images, ("a", "b", "c", "d")))


def test_the_page_needs_no_network_and_no_script(text: str) -> None:
    page = Page(text)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe")]
    sources = page.attributes("src") + page.attributes("href") + page.attributes("xlink:href")
    assert sources and all(source.startswith(("data:image/", "#")) for source in sources)
    outside = set(re.findall(r"https?://[^\s\"'<>]+", text))
    assert all(address.startswith("http://www.w3.org/") for address in outside)  # SVG namespaces
    assert "@import" not in text and "url(http" not in text


def test_ids_are_unique_and_every_reference_has_its_target(text: str) -> None:
    ids = Page(text).attributes("id")
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text))
    assert wanted <= set(ids)


def test_images_and_figures_have_alternative_texts(text: str) -> None:
    page = Page(text)
    alts = [attrs.get("alt") for tag, attrs in page.tags if tag == "img"]
    assert len(alts) == 12 and all(alts)
    assert alts[0] == "Full precision, image 0 (a)"
    labels = [attrs["aria-label"] for _, attrs in page.tags if attrs.get("role") == "img"]
    assert len(labels) == 12 and all(labels)  # six figures, wide and narrow


def test_the_headline_says_passed_with_the_figures_and_units(text: str) -> None:
    assert "✓ Passed" in text and "Every check held." in text
    plain = text.replace("\u00a0", " ")
    assert "bits a weight, scales included" in plain
    # 10 log10(4 / 0.0202) = 22.967 dB
    assert "23.0 dB" in plain
    assert "5.00 → 5.10; 95 % interval −0.200 to +0.400 over 64 image pairs" in plain
    assert "this machine was busy" in text


def test_a_failure_shows_its_reason_in_the_headline(report: Report) -> None:
    failed = changed(report, parity={"passed": False, "reason": "FID changes by +1.4"})
    assert "✕ Failed" in render(failed, None)
    assert "FID changes by +1.4." in render(failed, None)


def test_a_check_that_was_not_run_is_never_shown_as_passed(report: Report) -> None:
    checks = [check.model_dump() for check in report.parity.checks]
    checks[-1] |= {"outcome": "not run", "value": None, "limit": None, "why": "no reference"}
    made = changed(
        report,
        parity={"checks": checks, "complete": False, "fid": None, "reason": "no reference"},
    )
    text = render(made, None)
    assert "Passed what was run" in text and "✓ Passed<" not in text
    assert 'class="state wait">not run' in text
    assert "FID against full precision" not in text


def test_hostile_names_are_escaped(report: Report) -> None:
    hostile = "<script>alert(1)</script>"
    made = changed(report, model={"name": hostile})
    text = render(made, None)
    assert hostile not in text and "&lt;script&gt;" in text
    Page(text)


def test_the_same_report_gives_the_same_page(report: Report, text: str, images: Any) -> None:
    assert render(report, make_samples(*images, ("a", "b", "c", "d"))) == text


def test_figures_are_drawn_in_the_pages_colours_alone(report: Report) -> None:
    plots = all_plots(report)
    assert set(plots) == {"timesteps", "blocks", "sizes", "layers", "fid", "timings"}
    for found in plots.values():
        for drawn in (found.wide, found.narrow):
            assert "#0" not in drawn  # a stand-in colour left over
            assert "var(--" in drawn and "<text" in drawn
            assert "viewBox" in drawn and not re.match(r"<svg[^>]* width=", drawn)


def test_figures_without_data_are_left_out(report: Report) -> None:
    layers = [
        layer.model_dump() | {"weight_error": None, "output_error": None}
        for layer in report.plan.layers
    ]
    bare = changed(
        report,
        plan={"layers": layers},
        parity={"fid": None, "blocks": [], "timesteps": [], "linears": []},
        timings_s={"quantize": 0.0, "onnx": 0.0},
    )
    assert set(all_plots(bare)) == {"sizes"}
    Page(render(bare, None))


def test_errors_of_zero_and_null_are_drawn_as_gaps(report: Report) -> None:
    pairs = [
        {"timestep": 9, "simulation_vs_full_precision": 0.0, "engine_vs_simulation": None},
        {"timestep": 0, "simulation_vs_full_precision": 0.1, "engine_vs_simulation": None},
    ]
    made = changed(report, parity={"timesteps": pairs})
    assert "ONNX Runtime" not in all_plots(made)["timesteps"].wide


def test_many_blocks_are_not_labelled_and_share_their_row(report: Report) -> None:
    layers = [
        layer.model_dump() | {"block": block, "name": f"transformer_blocks.{block}.attn1.to_q"}
        for block in range(28)
        for layer in report.plan.layers[1:2]
    ]
    made = changed(report, plan={"layers": layers}, parity={"fid": None}, timings_s={"onnx": 0.0})
    assert 'class="tall"' in render(made, None)
    # one column's name, 28 row numbers, and the axis' name; no figure in any cell
    assert all_plots(made)["layers"].wide.count("<text") == 1 + 28 + 1


def test_three_files_are_written_and_two_without_images(
    report: Report, images: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    written = write_report(report, tmp_path, *images)
    assert [path.name for path in written] == ["report.json", "report.html", "samples.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(p.name for p in written)
    assert [path.name for path in write_report(report, tmp_path / "bare")] == [
        "report.json",
        "report.html",
    ]


@pytest.mark.parametrize(
    ("full", "quantized", "captions", "message"),
    [
        ((2, 3, 8, 8), (3, 3, 8, 8), (), "two tensors .* of one shape"),
        ((2, 4, 8, 8), (2, 4, 8, 8), (), "two tensors .* of one shape"),
        ((2, 3, 8, 8), (2, 3, 8, 8), ("a",), "2 images need as many captions or none, got 1"),
    ],
    ids=["count", "channels", "captions"],
)
def test_samples_that_do_not_fit_are_refused(
    report: Report,
    tmp_path: Path,
    full: tuple[int, ...],
    quantized: tuple[int, ...],
    captions: tuple[str, ...],
    message: str,
) -> None:
    with pytest.raises(InputError, match=message):
        write_report(report, tmp_path, torch.zeros(full), torch.zeros(quantized), captions)
