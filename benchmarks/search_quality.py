"""Found plans against uniform ones: FID and paired PSNR, GPTQ on the same calibration set for all.

    qdit-export --bits w4a8 --search sensitivity --budget effective-bits=g128 --output build/s128
    python benchmarks/search_quality.py --bits w4a8 --uniform 128,64,32 \
        --plans build/s128/plan.json --images 10000 --device cuda --fast --json search.json

Every row starts from the same noise, which no search has seen (--seed); the full-precision images
are made once. The calibration set is the one that `qdit-export` collects with its defaults, so a
found plan is quantized into the very weights of its export. --fast compiles the simulation and
runs products in float16, for full precision too (CUDA).
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from qdit.calibrate.blockwise import quantize_model
from qdit.calibrate.features import load_features
from qdit.calibrate.fid import fid_difference, read_reference
from qdit.calibrate.model import DiffusionModel
from qdit.calibrate.plan import QuantizationPlan, uniform_plan
from qdit.calibrate.sampling import SamplingSettings, decode_images, sample_images
from qdit.calibrate.schemes import LayerScheme, preset_bits
from qdit.calibrate.search.space import search_space
from qdit.calibrate.search.switchable import CandidateDenoiser
from qdit.calibrate.search.weight_cache import build_weight_cache
from qdit.calibrate.sources import load_model
from qdit.calibrate.trajectories import collect_calibration_set
from qdit.engines.devices import default_batch_size
from qdit.files import write_json


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=None)
    parser.add_argument("--bits", default="w4a8")
    parser.add_argument("--uniform", default="128,64", help="group sizes, both sides")
    parser.add_argument("--plans", default="", help="plan files, separated by commas")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=7777)
    parser.add_argument("--calib-seed", type=int, default=0, help="the export's --seed")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def plans_of(
    arguments: argparse.Namespace, model: DiffusionModel
) -> Iterator[tuple[str, QuantizationPlan]]:
    """(label, plan) of every row."""
    weight_bits, activation_bits = preset_bits(arguments.bits)
    for text in filter(None, arguments.uniform.split(",")):
        scheme = LayerScheme(
            weight_bits, activation_bits, weight_group=int(text), activation_group=int(text)
        )
        yield f"uniform g{text}", uniform_plan(arguments.bits, scheme, model.linears)
    for path in filter(None, arguments.plans.split(",")):
        value = json.loads(Path(path).read_text("utf-8"))
        yield Path(path).parent.name, QuantizationPlan.from_json(value)


def images_of(
    arguments: argparse.Namespace, model: DiffusionModel, candidate: CandidateDenoiser
) -> Tensor:
    """Images [n, 3, H, W] in [-1, 1] on the CPU."""
    samples = sample_images(
        model,
        model.as_denoiser(candidate.module),
        SamplingSettings(arguments.steps, arguments.guidance, arguments.seed),
        range(arguments.images),
        batch_size=arguments.batch,
        device=model.device,
    )
    return decode_images(model, samples, batch_size=arguments.batch)


def psnr(first: Tensor, second: Tensor) -> float:
    """dB with peak 2, over all values of all images."""
    return float(10 * torch.log10(4 / (first.double() - second.double()).square().mean()))


def main() -> None:
    arguments = parse()
    model = load_model(arguments.model, device=arguments.device)
    batch = default_batch_size(model.device.type)
    calibration = collect_calibration_set(
        model,
        SamplingSettings(20, 1.5, arguments.calib_seed),
        256,
        batch_size=batch,
        device=model.device,
    )
    weight_bits, activation_bits = preset_bits(arguments.bits)
    space = search_space(
        model.linears, LayerScheme(weight_bits, activation_bits), arguments.bits, groups=[128]
    )
    cache = build_weight_cache(model, space, "nearest", None, device=model.device)
    candidate = CandidateDenoiser(model, cache, device=model.device, fast=arguments.fast)
    embedded = load_model(None)
    if embedded.features is None or embedded.reference is None:
        raise SystemExit("the embedded demo lacks its FID files")
    extractor = load_features(model.features or embedded.features)
    reference = read_reference(model.reference or embedded.reference)
    full = images_of(arguments, model, candidate)
    features = extractor(full)
    rows = []
    for label, plan in plans_of(arguments, model):
        fresh = copy.copy(model)
        fresh.denoiser = copy.deepcopy(model.denoiser)
        started = time.perf_counter()
        result = quantize_model(
            fresh, plan, "gptq", calibration, batch_size=batch, device=model.device
        )
        seconds = time.perf_counter() - started
        candidate.take(plan, result.weights)
        images = images_of(arguments, model, candidate)
        fid = fid_difference(features, extractor(images), reference)
        row = {
            "bits": arguments.bits,
            "plan": label,
            "effective_weight_bits": plan.effective_weight_bits(model.linears),
            "psnr_db": psnr(full, images),
            "fid_full_precision": fid.full_precision,
            "fid": fid.quantized,
            "difference": fid.difference,
            "ci95": list(fid.ci95),
            "quantize_seconds": seconds,
        }
        rows.append(row)
        print(
            f"{arguments.bits} {label:>16} {row['effective_weight_bits']:.4f} bits  "
            f"PSNR {row['psnr_db']:.2f} dB  FID {fid.full_precision:.3f} → {fid.quantized:.3f} "
            f"[{fid.ci95[0]:+.3f}, {fid.ci95[1]:+.3f}]",
            flush=True,
        )
        if arguments.json:
            kept = {name: str(value) for name, value in vars(arguments).items()}
            write_json(arguments.json, {"arguments": kept, "rows": rows})


if __name__ == "__main__":
    main()
