"""The engine `torch` against the simulation on the same noise: FID and paired PSNR of many images.

    qdit-export --bits w4a8 --output build/demo
    python benchmarks/engine_quality.py build/demo --images 10000 --json build/engine-quality.json

Full precision and the simulation run in PyTorch, compiled, with products in float16; the engine
runs its kernels in float16. Each row is judged against full precision; the last line is how far the
engine's images are from the simulation's. Needs a GPU and the embedded demo's FID files.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from qdit.calibrate.checkpoint import QuantizedCheckpoint
from qdit.calibrate.families.base import Denoiser
from qdit.calibrate.features import load_features
from qdit.calibrate.fid import fid_difference, read_reference
from qdit.calibrate.psnr import psnr
from qdit.calibrate.sampling import SamplingSettings, decode_images, sample_images
from qdit.calibrate.schemes import LayerScheme
from qdit.calibrate.search.space import search_space
from qdit.calibrate.search.switchable import CandidateDenoiser
from qdit.calibrate.search.weight_cache import build_weight_cache
from qdit.calibrate.sources import load_model
from qdit.engines.machine import describe_machine
from qdit.engines.torch_engine.engine import TorchEngine
from qdit.files import write_json


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="an exported folder of the demo")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=7777)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def distance_db(first: Tensor, second: Tensor) -> float | None:
    """PSNR of all values of all images."""
    return psnr(float((first.double() - second.double()).square().mean()))


def main() -> None:
    arguments = parse()
    model = load_model(None, device="cuda")
    if model.features is None or model.reference is None:
        raise SystemExit("the embedded demo lacks its FID files")
    extractor, reference = load_features(model.features), read_reference(model.reference)
    checkpoint = QuantizedCheckpoint.read(arguments.folder)

    def images(denoiser: Denoiser) -> Tensor:
        samples = sample_images(
            model,
            denoiser,
            SamplingSettings(arguments.steps, arguments.guidance, arguments.seed),
            range(arguments.images),
            batch_size=arguments.batch,
            device=model.device,
        )
        return decode_images(model, samples, batch_size=arguments.batch)

    space = search_space(model.linears, LayerScheme(4, 8), "w4a8", groups=[128])
    cache = build_weight_cache(model, space, "nearest", None, device=model.device)
    candidate = CandidateDenoiser(model, cache, device=model.device, fast=True)
    full = images(model.as_denoiser(candidate.module))
    candidate.take(checkpoint.plan, checkpoint.weights)
    makers: dict[str, Callable[[], Denoiser]] = {
        "simulation": lambda: model.as_denoiser(candidate.module),
        "torch": lambda: TorchEngine(checkpoint).as_denoiser(
            model.family, dict(model.denoiser.config)
        ),
    }
    features = extractor(full)
    rows, made = [], {}
    for label, denoiser in makers.items():
        made[label] = images(denoiser())
        fid = fid_difference(features, extractor(made[label]), reference)
        rows.append(
            {
                "images of": label,
                "psnr_db": distance_db(full, made[label]),
                "fid_full_precision": fid.full_precision,
                "fid": fid.quantized,
                "difference": fid.difference,
                "ci95": list(fid.ci95),
            }
        )
        print(
            f"{label:>10}: PSNR {rows[-1]['psnr_db']:.2f} dB, FID {fid.full_precision:.4f} → "
            f"{fid.quantized:.4f} [{fid.ci95[0]:+.4f}, {fid.ci95[1]:+.4f}]",
            flush=True,
        )
    between = fid_difference(extractor(made["simulation"]), extractor(made["torch"]), reference)
    distance = distance_db(made["simulation"], made["torch"])
    print(
        f"engine against simulation: {distance:.2f} dB, FID {between.difference:+.4f} "
        f"[{between.ci95[0]:+.4f}, {between.ci95[1]:+.4f}]"
    )
    if arguments.json:
        write_json(
            arguments.json,
            {
                "machine": describe_machine(),
                "rows": rows,
                "engine_against_simulation": {
                    "psnr_db": distance,
                    "fid_difference": between.difference,
                    "ci95": list(between.ci95),
                },
            },
        )


if __name__ == "__main__":
    main()
