"""What a search will do, counted before it starts: for the estimate and for --dry-run."""

from __future__ import annotations

from dataclasses import dataclass

from ...calibrate.search.fitness import PAPER_IMAGES, PAPER_STEPS
from ..options import ExportOptions
from .sizes import JUDGED_IMAGES, LEVEL_IMAGES, LEVEL_STEPS, REFINE, UNIFORM_GROUPS


@dataclass(frozen=True)
class Forecast:
    """trajectories: samplings of a few images, one a linear; plans: candidates judged by images;
    forwards: denoiser samples of all that; quantized: whole plans quantized on the way, counting
    the making of all group sizes as one."""

    trajectories: int
    plans: int
    forwards: float
    quantized: int


def forecast(options: ExportOptions, linears: int, device: str) -> Forecast:
    """Counts for `--search` on a model of so many linears; all 0 without a search."""
    kind = "cuda" if device.startswith("cuda") else "cpu"
    steps = min(LEVEL_STEPS, options.num_inference_steps)
    per_image = steps * (2 if options.guidance_scale != 1.0 else 1)
    judged = options.search_refine or REFINE[options.search_method][kind]
    uniform = 0
    if judged > 1:
        uniform = len(UNIFORM_GROUPS) if kind == "cuda" else 1
    if options.search_method == "sensitivity":
        trajectories = linears + 2  # full precision, each linear's weights, all activations
        images = options.search_images or JUDGED_IMAGES[kind]
        plans = (judged + uniform) if judged > 1 else 0
        forwards = per_image * (trajectories * LEVEL_IMAGES[kind] + plans * images)
        return Forecast(trajectories, plans, forwards, 1 + plans)
    if options.search_method == "evolutionary":
        population = options.search_population
        plans = population * (1 + options.search_generations)
        images = options.search_images or PAPER_IMAGES
        again = (judged + len(UNIFORM_GROUPS)) if judged > 1 else 0
        forwards = plans * images * PAPER_STEPS + again * JUDGED_IMAGES[kind] * per_image
        return Forecast(0, plans, forwards, 1 + again)
    return Forecast(0, 0, 0, 0)
