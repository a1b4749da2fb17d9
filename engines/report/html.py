"""report.html: one file that needs no network, readable on a phone, in light and dark."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from importlib import resources

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..engine import ENGINE_TITLES
from . import numbers
from .grid import DIFFERENCE_GAIN, Pixels, Samples, encode
from .integer_scales import integer_scales_plot, integer_scales_text
from .plots import MOST_LABELLED_BLOCKS, all_plots, layer_errors
from .schema import CheckEntry, ParityEntry, Report
from .search_plots import search_plots
from .search_text import front_note, plan_table, sentences
from .svg import Picture
from .targets_text import target_views

_TEMPLATE = "report.html.j2"
_STYLE = "report.css"

_CHECKS = {
    "finite_images": "No image holds NaN or infinity",
    "linears_same_input": "Each linear, fed the same input",
    "engine_vs_file": "Engine against its own file in ONNX Runtime",
    "denoiser_bound": "Whole denoiser, engine against simulation",
    "simulation_error": "Whole denoiser, against full precision",
    "fid_increase": "FID increase, lower end of its interval",
}


@dataclass(frozen=True)
class Tile:
    """One headline figure: what it is, the figure, and a line that explains it."""

    label: str
    figure: str
    detail: str


@dataclass(frozen=True)
class Row:
    """One row of sample images, as data URLs with alternative texts."""

    label: str
    images: tuple[tuple[str, str], ...]


def render(report: Report, samples: Samples | None) -> str:
    """The page as text. The same report and samples give the same page."""
    folder = resources.files(__package__)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "bytes": numbers.byte_size,
        "error": numbers.error,
        "plain": numbers.plain,
        "signed": numbers.signed,
        "seconds": numbers.seconds,
        "count": numbers.count,
    }
    template = environment.from_string(folder.joinpath(_TEMPLATE).read_text(encoding="utf-8"))
    return template.render(
        report=report,
        style=Markup(folder.joinpath(_STYLE).read_text(encoding="utf-8")),
        plots={
            name: {"wide": Markup(p.wide), "narrow": Markup(p.narrow), "alt": p.alt}
            for name, p in _plots(report).items()
        },
        tiles=tiles(report),
        engine_title=_title(report.parity.engine),
        rows=[] if samples is None else sample_rows(samples, report.plan.bits),
        captions=() if samples is None else samples.captions,
        check_names=_CHECKS,
        check_figures={check.name: _check_figures(check) for check in report.parity.checks},
        command=re.split(r" (?=--)", report.command),
        fid_note=_fid_note(report),
        search_sentences=[] if report.search is None else sentences(report, report.search),
        search_note="" if report.search is None else front_note(report.search),
        search_table=None if report.search is None else plan_table(report.search),
        integer_scales_text=integer_scales_text(report),
        targets=target_views(report),
        layers_note=_layers_note(report),
        tall_layers=len({layer.block for layer in report.plan.layers}) > MOST_LABELLED_BLOCKS,
        machine=_machine_rows(report),
        settings=_settings_rows(report),
        small_images=samples is not None and samples.full.shape[2] <= 128,
        has_errors=any(layer.weight_error is not None for layer in report.plan.layers),
        same_input={linear.name: linear.relative_error for linear in report.parity.linears},
    )


def _plots(report: Report) -> dict[str, Picture]:
    scales = integer_scales_plot(report)
    found = {} if scales is None else {"integer_scales": scales}
    return all_plots(report) | search_plots(report) | found


def tiles(report: Report) -> list[Tile]:
    """The headline figures that this report has."""
    sizes, plan, parity = report.sizes, report.plan, report.parity
    ratio = sizes.full_precision_fp16_bytes / sizes.quantized_bytes
    found = [
        Tile(
            "Size",
            numbers.byte_size(sizes.quantized_bytes),
            f"{ratio:.1f} × smaller than {numbers.byte_size(sizes.full_precision_fp16_bytes)} "
            f"in float16; {plan.effective_weight_bits:.2f} bits a weight, scales included",
        )
    ]
    if parity.images is not None:
        found.append(_image_tile(report))
    if parity.fid is not None:
        fid = parity.fid
        low, high = fid.difference_ci95
        found.append(
            Tile(
                "FID difference",
                numbers.signed(fid.difference),
                f"{numbers.plain(fid.full_precision)} → {numbers.plain(fid.quantized)}; 95 % "
                f"interval {numbers.signed(low)} to {numbers.signed(high)} over "
                f"{numbers.count(fid.samples)} image pairs",
            )
        )
    return [*found, _engine_tile(parity)]


def _engine_tile(parity: ParityEntry) -> Tile:
    engine, title = parity.engine_vs_simulation, _title(parity.engine)
    narrow, wide = engine.bound.own_dtypes
    if parity.engine_vs_file is not None:
        return Tile(
            f"{title} vs its file",
            numbers.error(parity.engine_vs_file.relative_error),
            "relative error of the predicted noise against the same file in ONNX Runtime, which is "
            f"{numbers.error(parity.file_own_relative_error)} from itself without optimizations; "
            f"{numbers.error(engine.relative_error)} from the simulation",
        )
    return Tile(
        f"{title} vs simulation",
        numbers.error(engine.relative_error),
        f"relative error of the predicted noise: {numbers.plain(engine.bound.ratio)} times the "
        f"simulation's own distance between {narrow} and {wide}; at most "
        f"{engine.bound.limit:g} is allowed",
    )


def _title(engine: str) -> str:
    title = ENGINE_TITLES.get(engine, engine)
    return title[0].upper() + title[1:]


def _image_tile(report: Report) -> Tile:
    images = report.parity.images
    if images is None:
        raise ValueError("this report has no images")
    if images.identical:
        return Tile("Images", "identical", f"all {numbers.count(images.samples)} pairs are equal")
    detail = (
        f"over {numbers.count(images.samples)} pairs from the same noise; worst image "
        f"{numbers.decibel(images.psnr_db_min)}, median {numbers.decibel(images.psnr_db_median)}"
    )
    return Tile("PSNR of the images", numbers.decibel(images.psnr_db), detail)


def sample_rows(samples: Samples, bits: str) -> list[Row]:
    """Three rows of images, encoded once each."""
    return [
        _row("Full precision", samples.full),
        _row(f"Quantized to {bits}", samples.quantized),
        _row(f"Difference × {DIFFERENCE_GAIN}, about grey", samples.difference),
    ]


def _row(label: str, images: Pixels) -> Row:
    encoded = []
    for index, pixels in enumerate(images):
        media, data = encode(pixels)
        url = f"data:{media};base64,{base64.b64encode(data).decode()}"
        encoded.append((url, f"{label}, image {index}"))
    return Row(label, tuple(encoded))


def _fid_note(report: Report) -> str:
    fid = report.parity.fid
    if fid is None or fid.samples > fid.dimensions:
        return ""
    return (
        f" With {fid.samples} images for {fid.dimensions} features both FIDs lie far above their "
        "large-sample values: read only their difference."
    )


def _layers_note(report: Report) -> str:
    kind, values = layer_errors(report)
    if not values:
        return ""
    what = {
        "output": "Relative error of each linear's output on calibration inputs, in percent",
        "weight": "Relative error of each linear's weights, in percent",
    }[kind]
    low, high = numbers.error(min(values.values())), numbers.error(max(values.values()))
    return f"{what}: from {low} (faintest) to {high}."


def _check_figures(check: CheckEntry) -> tuple[str, str]:
    if check.outcome == "not run":
        return "–", "–"
    if check.name in ("linears_same_input", "simulation_error"):
        return numbers.error(check.value), numbers.error(check.limit)
    if check.name == "fid_increase" and check.value is not None and check.limit is not None:
        return numbers.signed(check.value), numbers.signed(check.limit)
    suffix = " ×" if check.name == "denoiser_bound" else ""
    value = "not finite" if check.value is None else numbers.plain(check.value) + suffix
    return value, numbers.plain(check.limit) + suffix


def _machine_rows(report: Report) -> list[tuple[str, str]]:
    machine = report.machine
    rows = [("machine", str(machine.get("summary", ""))), ("system", str(machine.get("os", "")))]
    rows.append(("Python", str(machine.get("python", ""))))
    rows.append(("versions", ", ".join(f"{k} {v}" for k, v in report.versions.items())))
    return [(label, value) for label, value in rows if value]


def _settings_rows(report: Report) -> list[tuple[str, str]]:
    sampling, source = report.sampling, report.model.source
    channels, height, width = (*report.model.sample_shape, 1, 1)[:3]
    return [
        ("model", f"{report.model.name}, {numbers.millions(report.model.parameters)} parameters"),
        ("source", f"{source.location} ({source.kind})"),
        ("sample", f"{channels} × {height} × {width}, {report.model.classes} classes"),
        ("weights", f"{report.plan.weights or 'as given'}, {report.plan.bits}"),
        (
            "sampling",
            f"{sampling.scheduler or 'the model’s scheduler'}, "
            f"{sampling.num_inference_steps} steps, guidance {sampling.guidance_scale:g}, "
            f"seed {sampling.seed}",
        ),
        ("compute type", report.parity.dtype),
        ("made", report.created),
    ]
