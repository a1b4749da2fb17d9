"""How long an export will take: one measured forward, and the counts that multiply it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from ..calibrate.model import DiffusionModel
from .options import ExportOptions, ProofOptions
from .search.forecast import forecast

# Images are made in pairs within about this time for each of the two engines.
_IMAGE_SECONDS = {"cpu": 60.0, "cuda": 180.0}
_FEWEST_IMAGES, _MOST_IMAGES = 16, 10_000
# A quantized linear in simulation or in ONNX Runtime's reference form costs about this much more
# than a full-precision one (docs/performance.md has the measured ratios).
_QUANTIZED_COST = 1.6
# GPTQ sees each block twice for every sample, once for statistics and once quantized.
_GPTQ_FORWARDS = 2 * _QUANTIZED_COST
_FIXED_SECONDS = {"onnx": 20.0, "parity": 15.0, "report": 5.0}


@dataclass(frozen=True)
class Estimate:
    """Seconds by step, and the image pairs that they count on."""

    seconds: dict[str, float]
    fid_samples: int

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def measure_forward(model: DiffusionModel, batch: int, repeats: int = 3) -> float:
    """Seconds a sample of one full-precision forward (least of `repeats`, after a warm-up)."""
    generator = torch.Generator().manual_seed(0)
    inputs = model.family.example_inputs(model.denoiser, batch, generator)
    x, timestep, label = (tensor.to(model.device) for tensor in inputs)
    denoiser = model.as_denoiser()
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        denoiser(x, timestep, label).sum().item()  # .item() waits for the device
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:]) / batch


def forwards_per_image(options: ProofOptions) -> int:
    """Denoiser samples that one image costs; guidance needs a second, unconditional one."""
    return options.num_inference_steps * (2 if options.guidance_scale != 1.0 else 1)


def choose_fid_samples(options: ProofOptions, seconds_per_sample: float, device: str) -> int:
    """`--fid-samples`, or for 'auto' the power of two that this device makes in about a minute."""
    if options.fid_samples is not None:
        return options.fid_samples
    budget = _IMAGE_SECONDS["cuda" if device.startswith("cuda") else "cpu"]
    affordable = budget / (seconds_per_sample * forwards_per_image(options))
    count = _FEWEST_IMAGES
    while count * 2 <= min(affordable, _MOST_IMAGES):
        count *= 2
    return _MOST_IMAGES if affordable >= _MOST_IMAGES else count


def estimate(options: ExportOptions, model: DiffusionModel, seconds_per_sample: float) -> Estimate:
    """Predict each step's seconds for `qdit-export`."""
    images = choose_fid_samples(options, seconds_per_sample, model.device.type)
    per_image = forwards_per_image(options) * seconds_per_sample
    seconds = dict(_FIXED_SECONDS)
    if options.weights == "gptq" or options.search_method != "none":
        trajectories = -(-options.calib_samples // 8)
        seconds["calibration"] = trajectories * per_image
    if options.weights == "gptq":
        seconds["quantize"] = options.calib_samples * _GPTQ_FORWARDS * seconds_per_sample
    if options.search_method != "none":
        counts = forecast(options, len(model.linears), model.device.type)
        gptq = options.calib_samples * _GPTQ_FORWARDS if options.weights == "gptq" else 0.0
        work = counts.forwards * _QUANTIZED_COST + counts.quantized * gptq
        seconds["search"] = work * seconds_per_sample
    seconds["images"] = images * per_image * (1 + _QUANTIZED_COST)
    return Estimate(seconds, images)
