"""The kits of `tensorrt_engines.py`: a folder a model, with its files for one TensorRT, inputs, and
what ONNX Runtime makes of each file. Making one needs PyTorch, reading it does not.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from qdit.errors import InputError
from qdit.files import write_json
from qdit.progress import Progress

KINDS = ("tensorrt-fp16", "tensorrt-int8")
MODELS = ("demo", "random:DiT-XL/2")
FACTS = "kit.json"


def make_kit(arguments: argparse.Namespace, progress: Progress) -> None:
    """One folder a model: both files, inputs and references, and what they are."""
    from qdit.export.tensorrt.versions import TensorRtVersion, features

    wanted = features(TensorRtVersion.parse(arguments.tensorrt_version))
    for source in arguments.models.split(","):
        blocks = None if source == "demo" else arguments.blocks
        folder = arguments.folder / re.sub(r"[^A-Za-z0-9]+", "-", source)
        folder.mkdir(parents=True, exist_ok=True)
        progress.say(f"{source}, {'all' if blocks is None else blocks} blocks → {folder}")
        _write_model(None if source == "demo" else source, blocks, folder, wanted, progress)
        _write_references(folder, source, blocks, arguments, progress)


def _write_model(
    source: str | None, blocks: int | None, folder: Path, wanted: Any, progress: Progress
) -> None:
    import torch

    from qdit.calibrate.blockwise import quantize_model
    from qdit.calibrate.checkpoint import QuantizedCheckpoint
    from qdit.calibrate.input_ranges import collect_input_ranges
    from qdit.calibrate.plan import uniform_plan
    from qdit.calibrate.sampling import SamplingSettings
    from qdit.calibrate.schemes import LayerScheme
    from qdit.calibrate.sources import load_model
    from qdit.calibrate.trajectories import collect_calibration_set
    from qdit.export.tensorrt.files import export_baseline, export_int8

    model = load_model(source, blocks=blocks)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = SamplingSettings(num_inference_steps=10, guidance_scale=1.5, seed=0)
    samples = collect_calibration_set(
        model, settings, 20, per_trajectory=10, batch_size=2, device=device, progress=progress
    )
    model.denoiser.cpu()
    export_baseline(model, folder / f"{KINDS[0]}.onnx", wanted, progress=progress)
    plan = uniform_plan("w8a8", LayerScheme(8, 8, "channel", "token"), model.linears)
    result = quantize_model(model, plan, "nearest", None, device="cpu", progress=progress)
    checkpoint = QuantizedCheckpoint.from_result(model, plan, result.weights, {}, {})
    read = [spec for spec in checkpoint.linears if plan[spec.name].quantizes_activations]
    simulation = checkpoint.build_denoiser(device)
    ranges = collect_input_ranges(
        checkpoint.family, simulation, read, samples, batch_size=4, progress=progress
    )
    scales = {name: entry.static_scale() for name, entry in ranges.items()}
    export_int8(checkpoint, folder / f"{KINDS[1]}.onnx", scales, wanted, progress=progress)
    names = [spec.name for spec in checkpoint.family.inputs(simulation)]
    given = dict(zip(names, (t.numpy() for t in samples.tensors), strict=True))
    np.savez(folder / "samples.npz", **given)  # type: ignore[arg-type]


def _write_references(
    folder: Path,
    source: str,
    blocks: int | None,
    arguments: argparse.Namespace,
    progress: Progress,
) -> None:
    """What ONNX Runtime makes of each file, on samples spread over the timesteps."""
    from qdit.engines.onnxruntime_engine import OnnxRuntimeEngine

    samples = dict(np.load(folder / "samples.npz"))
    count = arguments.compare
    places = np.linspace(0, len(samples["timestep"]) - 1, count).round().astype(int)
    inputs = {name: array[places] for name, array in samples.items()}
    np.savez(folder / "inputs.npz", **inputs)
    for kind in KINDS:
        progress.say(f"{kind}: {count} samples in ONNX Runtime, optimized and node by node")
        made = {}
        for name, optimize in (("sample", True), ("plain", False)):
            engine = OnnxRuntimeEngine(folder / f"{kind}.onnx", optimize=optimize)
            made[name] = engine.infer(inputs)["sample"]
            engine.close()
        np.savez(folder / f"{kind}.reference.npz", **made)
    facts = {"source": source, "blocks": blocks, "tensorrt": arguments.tensorrt_version}
    write_json(folder / FACTS, facts)


def kit_models(arguments: argparse.Namespace) -> list[tuple[Path, dict[str, Any]]]:
    """The kit's folders that were asked for, and what they are. Raises `InputError`."""
    found = [
        (path.parent, json.loads(path.read_text()))
        for path in sorted(arguments.folder.glob(f"*/{FACTS}"))
    ]
    if not found:
        raise InputError(f"no kit in {arguments.folder}; run `make` first")
    wanted = arguments.models.split(",") if arguments.models else [f["source"] for _, f in found]
    if missing := set(wanted) - {facts["source"] for _, facts in found}:
        raise InputError(f"{arguments.folder} has no {min(missing)}; make it with --models")
    chosen = [(folder, facts) for folder, facts in found if facts["source"] in wanted]
    for folder, facts in chosen:
        _check_version(facts["tensorrt"], folder)
    return chosen


def _check_version(made_for: str, folder: Path) -> None:
    from qdit.engines.tensorrt.library import installed_version

    installed = str(installed_version())
    if made_for.split(".")[0] != installed.split(".")[0]:
        raise InputError(
            f"the kit {folder} is for TensorRT {made_for}, and {installed} is installed; make one "
            f"with --tensorrt-version {installed}"
        )
