"""FID and paired PSNR of quantized simulations of the demo: round-to-nearest beside GPTQ.

    python benchmarks/demo_quality.py --images 10000 --steps 20 --guidance 1.5 --device cuda
    python benchmarks/demo_quality.py --images 64 --steps 10 --guidance 1.0 --schemes w4a8:128:128

A scheme is BITS:WEIGHT_GROUP:ACTIVATION_GROUP, with :integer behind it for integer scales. Every
row starts from the same noise, and the full-precision images are made once. PSNR is over all values
of all images, peak 2 ([-1, 1]).
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qdit.calibrate.blockwise import quantize_model
from qdit.calibrate.features import load_features
from qdit.calibrate.fid import fid_difference, read_reference
from qdit.calibrate.model import DiffusionModel
from qdit.calibrate.plan import uniform_plan
from qdit.calibrate.sampling import SamplingSettings, decode_images, sample_images
from qdit.calibrate.schemes import LayerScheme, preset_bits
from qdit.calibrate.sources import load_model
from qdit.calibrate.trajectories import CalibrationSet, collect_calibration_set
from qdit.files import write_json

DEFAULT_SCHEMES = (
    "w8a8:128:128,w8a8:channel:token,w4a8:channel:token,w4a8:128:128,w4a8:64:64,w3a8:128:128"
)


@dataclass(frozen=True)
class Sampler:
    """What every row shares."""

    model: DiffusionModel
    settings: SamplingSettings
    count: int
    batch: int
    compile: bool

    def images(self, denoiser: torch.nn.Module) -> Tensor:
        """Images [n, 3, H, W] in [-1, 1] on the CPU."""
        runnable = torch.compile(denoiser, dynamic=False) if self.compile else denoiser
        call = self.model.as_denoiser(runnable)
        samples = sample_images(
            self.model,
            call,
            self.settings,
            range(self.count),
            batch_size=self.batch,
            device=self.model.device,
        )
        return decode_images(self.model, samples, batch_size=self.batch).cpu()


def parse_scheme(text: str) -> LayerScheme:
    bits, weight_group, activation_group, *scale_format = text.split(":")
    weight_bits, activation_bits = preset_bits(bits)
    return LayerScheme(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        weight_group=int(weight_group) if weight_group.isdigit() else "channel",
        activation_group=int(activation_group) if activation_group.isdigit() else "token",
        scale_format="".join(scale_format) or "float",  # type: ignore[arg-type]
    )


def psnr(first: Tensor, second: Tensor) -> float:
    error = (first.double() - second.double()).square().mean()
    return float(10 * torch.log10(4 / error))


def quantized_copy(
    model: DiffusionModel, text: str, method: str, calibration: CalibrationSet
) -> tuple[torch.nn.Module, float]:
    """The simulation of one row and the seconds that quantization took."""
    fresh = copy.copy(model)
    fresh.denoiser = copy.deepcopy(model.denoiser)
    plan = uniform_plan(text.split(":")[0], parse_scheme(text), fresh.linears)
    started = time.perf_counter()
    quantize_model(
        fresh,
        plan,
        method,  # type: ignore[arg-type]
        calibration if method == "gptq" else None,
        batch_size=32,
        device=model.device,
    )
    return fresh.denoiser, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--calib-samples", type=int, default=256)
    parser.add_argument("--schemes", default=DEFAULT_SCHEMES)
    parser.add_argument("--methods", default="nearest,gptq")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    model = load_model(arguments.model, device=arguments.device)
    settings = SamplingSettings(arguments.steps, arguments.guidance, arguments.seed)
    sampler = Sampler(model, settings, arguments.images, arguments.batch, arguments.compile)
    calibration = collect_calibration_set(
        model,
        SamplingSettings(20, 1.5, arguments.seed + 1),
        arguments.calib_samples,
        batch_size=min(arguments.batch, 64),
        device=model.device,
    )
    # the extractor and statistics of the demo apply to any model of its image size
    embedded = load_model(None)
    if embedded.features is None or embedded.reference is None:
        raise SystemExit("the embedded demo lacks its FID files")
    extractor = load_features(model.features or embedded.features)
    reference = read_reference(model.reference or embedded.reference)

    full = sampler.images(model.denoiser)
    features = extractor(full)
    rows = []
    for text in arguments.schemes.split(","):
        for method in arguments.methods.split(","):
            denoiser, seconds = quantized_copy(model, text, method, calibration)
            images = sampler.images(denoiser)
            fid = fid_difference(features, extractor(images), reference)
            row = {
                "scheme": text,
                "method": method,
                "fid_full_precision": fid.full_precision,
                "fid": fid.quantized,
                "difference": fid.difference,
                "ci95": list(fid.ci95),
                "psnr_db": psnr(full, images),
                "quantize_seconds": seconds,
            }
            rows.append(row)
            print(
                f"{text:>20} {method:>8}  FID {fid.full_precision:.3f} → {fid.quantized:.3f}"
                f"  difference {fid.difference:+.3f} [{fid.ci95[0]:+.3f}, {fid.ci95[1]:+.3f}]"
                f"  PSNR {row['psnr_db']:.2f} dB  quantized in {seconds:.1f} s",
                flush=True,
            )
            if arguments.json:
                write_json(arguments.json, {"arguments": vars_of(arguments), "rows": rows})


def vars_of(arguments: argparse.Namespace) -> dict[str, str]:
    return {name: str(value) for name, value in vars(arguments).items()}


if __name__ == "__main__":
    main()
