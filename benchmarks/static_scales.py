"""What static activation scales cost: `tensorrt-int8` files against full precision, by timestep.

    python benchmarks/static_scales.py --json build/static-scales.json

For the demo at w8a8 (weights by channel, rounded to nearest), each way of choosing the scales, with
and without SmoothQuant, beside dynamic scales a token (the simulation). Files run in ONNX Runtime;
the figure is the relative error of the predicted noise against full precision, on inputs of
full-precision trajectories that the scales were not chosen from.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor

from qdit.calibrate.calibration_set import CalibrationSet
from qdit.calibrate.checkpoint import QuantizedCheckpoint
from qdit.calibrate.input_ranges import collect_input_ranges
from qdit.calibrate.model import DiffusionModel
from qdit.calibrate.plan import uniform_plan
from qdit.calibrate.quantizers import quantize_weight_nearest
from qdit.calibrate.sampling import SamplingSettings
from qdit.calibrate.schemes import LayerScheme
from qdit.calibrate.smoothing import smooth_model
from qdit.calibrate.sources import load_model
from qdit.calibrate.trajectories import collect_calibration_set
from qdit.engines.consoles import table_console
from qdit.engines.machine import describe_machine
from qdit.engines.onnxruntime_engine import OnnxRuntimeEngine
from qdit.export.tensorrt.files import export_int8
from qdit.export.tensorrt.versions import TensorRtVersion, features
from qdit.files import write_json
from qdit.progress import Progress, Terminal

SMOOTHING = (None, 0.3, 0.5, 0.7)
METHODS = ("mse", "max")
STEPS = 10
VERSION = features(TensorRtVersion(8, 6))  # float32 files: what is left is the scales alone

Errors = dict[int, float]  # by timestep, and −1 for all together


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=40, help="that scales are chosen from")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found: dict[str, Errors] = {}
    with Terminal() as progress, tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        full = load_model(None)
        chosen, judged = (samples_of(full, arguments.samples, seed, progress) for seed in (0, 1))
        expected = outputs(full, full.denoiser, judged)
        for smooth in SMOOTHING:
            found |= measure(smooth, chosen, judged, expected, Path(folder), progress)
    print_table(found)
    if arguments.json:
        write_json(arguments.json, {"machine": describe_machine(), "errors": found})


def samples_of(model: DiffusionModel, count: int, seed: int, progress: Progress) -> CalibrationSet:
    settings = SamplingSettings(num_inference_steps=STEPS, guidance_scale=1.5, seed=seed)
    return collect_calibration_set(model, settings, count, per_trajectory=STEPS, progress=progress)


def measure(
    smooth: float | None,
    chosen: CalibrationSet,
    judged: CalibrationSet,
    expected: Tensor,
    folder: Path,
    progress: Progress,
) -> dict[str, Errors]:
    """One smoothing: dynamic scales, and a file for each method."""
    model = load_model(None)
    if smooth is not None:
        names = {site.input_name for site in model.family.smoothing_sites(model.denoiser)}
        read = [spec for spec in model.linears if spec.input_name in names]
        ranges = collect_input_ranges(model.family, model.denoiser, read, chosen)
        smooth_model(model, ranges, smooth)
    checkpoint = quantized(model)
    simulation = checkpoint.build_denoiser()
    label = "" if smooth is None else f", smoothed {smooth:g}"
    dynamic = outputs(model, simulation, judged)
    found = {f"dynamic, a token{label}": errors(dynamic, expected, judged)}
    read = [s for s in checkpoint.linears if checkpoint.plan[s.name].quantizes_activations]
    ranges = collect_input_ranges(model.family, simulation, read, chosen)
    for method in METHODS:
        scales = {
            name: entry.static_scale(8, method)  # type: ignore[arg-type]
            for name, entry in ranges.items()
        }
        path = folder / f"{method}-{smooth}.onnx"
        export_int8(checkpoint, path, scales, VERSION, progress=progress)
        engine = OnnxRuntimeEngine(path)

        def run(*inputs: Tensor, engine: OnnxRuntimeEngine = engine) -> Tensor:
            names = [spec.name for spec in engine.input_specs]
            arrays = {n: value.numpy() for n, value in zip(names, inputs, strict=True)}
            return torch.from_numpy(engine.infer(arrays)[model.family.output_name])

        made = by_batches(model, run, judged)
        found[f"static, {method}{label}"] = errors(made, expected, judged)
        engine.close()
        path.unlink()
    return found


def quantized(model: DiffusionModel) -> QuantizedCheckpoint:
    plan = uniform_plan("w8a8", LayerScheme(8, 8, "channel", "token"), model.linears)
    weights = {
        spec.name: quantize_weight_nearest(
            model.denoiser.get_submodule(spec.name).weight, plan[spec.name]
        )
        for spec in model.linears
        if plan[spec.name].quantizes_weights
    }
    return QuantizedCheckpoint.from_result(model, plan, weights, {"weights": "nearest"}, {})


def outputs(model: DiffusionModel, denoiser: torch.nn.Module, samples: CalibrationSet) -> Tensor:
    def run(*inputs: Tensor) -> Tensor:
        return model.family.forward(denoiser, *inputs)

    return by_batches(model, run, samples)


def by_batches(
    model: DiffusionModel, run: Callable[..., Tensor], samples: CalibrationSet
) -> Tensor:
    """The predicted noise of every sample."""
    made = [run(*batch.tensors) for batch in samples.batches(10)]
    return model.family.noise_prediction(model.denoiser, torch.cat(made))


def errors(got: Tensor, expected: Tensor, samples: CalibrationSet) -> Errors:
    parts: dict[int, list[int]] = defaultdict(list)
    for index, timestep in enumerate(samples.timestep.tolist()):
        parts[timestep].append(index)
    found = {step: _relative(got[rows], expected[rows]) for step, rows in sorted(parts.items())}
    return found | {-1: _relative(got, expected)}


def _relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def print_table(found: dict[str, Any]) -> None:
    table = Table(box=SIMPLE, title="relative error of the predicted noise, by timestep")
    steps = list(next(iter(found.values())))
    table.add_column("activation scales", no_wrap=True)
    for step in steps:
        table.add_column("all" if step == -1 else f"t = {step}", justify="right")
    for name, values in found.items():
        table.add_row(name, *(f"{values[step]:.2g}" for step in steps))
    table_console().print(table)


if __name__ == "__main__":
    main()
