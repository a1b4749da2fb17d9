"""What the parts of one search share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...calibrate.model import DiffusionModel
from ...calibrate.plan import LinearSpec, QuantizationPlan
from ...calibrate.sampling import SamplingSettings
from ...calibrate.schemes import LayerScheme
from ...calibrate.search.budget import Budget
from ...calibrate.search.costs import CostModel, bitops_cost, tokens_per_image
from ...calibrate.search.space import SearchSpace
from ...calibrate.search.weight_cache import WeightCache
from ...calibrate.trajectories import CalibrationSet
from ...progress import Progress
from ..options import ExportOptions
from .sizes import LEVEL_STEPS

# Seeds apart from the proof's and the calibration's: a plan must not be chosen on the proof's noise
SEED_OFFSET = 1 << 20


@dataclass(frozen=True)
class SearchTask:
    """One search: the full-precision `model`, `scheme` with all but the groups, the space, the
    cost and its budget (`fixed` included), and a `folder` where finished parts are kept."""

    options: ExportOptions
    model: DiffusionModel
    scheme: LayerScheme
    space: SearchSpace
    costs: CostModel
    budget: Budget
    cache: WeightCache
    calibration: CalibrationSet
    folder: Path
    batch_size: int
    progress: Progress

    @property
    def linears(self) -> Sequence[LinearSpec]:
        return self.space.linears

    @property
    def on_gpu(self) -> bool:
        return self.model.device.type == "cuda"

    @property
    def sampling(self) -> SamplingSettings:
        """The proof's sampler with fewer steps and noise of its own."""
        options = self.options
        return SamplingSettings(
            num_inference_steps=min(LEVEL_STEPS, options.num_inference_steps),
            guidance_scale=options.guidance_scale,
            seed=options.seed + SEED_OFFSET,
            scheduler=options.scheduler,
        )

    def tie_break(self) -> CostModel:
        """Between plans of equal error: the one of fewer bit operations."""
        return bitops_cost(self.linears, tokens_per_image(self.model))

    def bits_of(self, plan: QuantizationPlan) -> float:
        return plan.effective_weight_bits(self.linears)
