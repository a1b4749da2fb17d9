"""What a plan costs, as sums over its linears: each measure is a budget that a search can keep.

A cost model's `share` is one linear's part, so that a solver may choose layer by layer;
`total(plan)` is `fixed` plus all shares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch

from ..checkpoint_layout import weight_entries
from ..model import DiffusionModel
from ..plan import LinearSpec, QuantizationPlan
from ..schemes import LayerScheme
from .bitops import linear_bitops
from .latency import LatencyTable, rows_of
from .space import SearchSpace

CostKind = Literal["effective-bits", "bytes", "bitops", "latency-ms"]
COST_KINDS: tuple[CostKind, ...] = get_args(CostKind)
_FLOAT16_BYTES = 2


class CostModel(Protocol):
    """One measure of cost over a model's linears. `fixed` is what no choice changes."""

    @property
    def kind(self) -> CostKind: ...

    @property
    def unit(self) -> str: ...

    @property
    def fixed(self) -> float: ...

    def share(self, spec: LinearSpec, scheme: LayerScheme) -> float:
        """One linear's part of the total; never negative."""

    def total(self, plan: QuantizationPlan) -> float:
        """`fixed` + Σ `share` over all linears."""


@dataclass(frozen=True)
class AdditiveCost:
    """A `CostModel` from a function of one linear and its scheme."""

    kind: CostKind
    unit: str
    fixed: float
    linears: tuple[LinearSpec, ...]
    share_of: Callable[[LinearSpec, LayerScheme], float]

    def share(self, spec: LinearSpec, scheme: LayerScheme) -> float:
        return self.share_of(spec, scheme)

    def total(self, plan: QuantizationPlan) -> float:
        # fsum rounds once: the order of the linears cannot decide what is within a budget
        return math.fsum([self.fixed, *(self.share(s, plan[s.name]) for s in self.linears)])


def choice_costs(costs: CostModel, space: SearchSpace) -> dict[str, tuple[float, ...]]:
    """The share of every choice of a space: what `solver.solve` takes. Without `costs.fixed`."""
    return {
        spec.name: tuple(costs.share(spec, scheme) for scheme in space.choices[spec.name])
        for spec in space.linears
    }


def effective_bits_cost(linears: Sequence[LinearSpec]) -> CostModel:
    """Bits per weight, scales and zero points counted: `plan.effective_weight_bits(linears)`."""
    weights = sum(spec.weight_count for spec in linears)

    def share(spec: LinearSpec, scheme: LayerScheme) -> float:
        return scheme.effective_weight_bits(spec.in_features) * spec.weight_count / weights

    return AdditiveCost("effective-bits", "bits per weight", 0.0, tuple(linears), share)


def bytes_cost(linears: Sequence[LinearSpec], fixed_bytes: int) -> CostModel:
    """Bytes of the checkpoint's two files, weights exactly as `weights.safetensors` lays them out.

    `fixed_bytes` is everything else: see `checkpoint_bytes.fixed_checkpoint_bytes`. An unquantized
    weight counts as float16.
    """

    def share(spec: LinearSpec, scheme: LayerScheme) -> float:
        if not scheme.quantizes_weights:
            return float(spec.weight_count * _FLOAT16_BYTES)
        return float(sum(part.byte_size for part in weight_entries(spec, scheme).values()))

    return AdditiveCost("bytes", "bytes", float(fixed_bytes), tuple(linears), share)


def bitops_cost(linears: Sequence[LinearSpec], tokens: int) -> CostModel:
    """BitOps of one image's denoiser call over all linears (`bitops.linear_bitops`).

    `tokens` as `tokens_per_image` gives them. Attention products, norms and embedders, the same in
    every plan, are not counted.
    """

    def share(spec: LinearSpec, scheme: LayerScheme) -> float:
        return linear_bitops(spec, scheme, rows_of(spec, tokens))

    return AdditiveCost("bitops", "bit operations per image", 0.0, tuple(linears), share)


def latency_cost(
    linears: Sequence[LinearSpec], table: LatencyTable, target: str, tokens: int, batch: int = 1
) -> CostModel:
    """Measured milliseconds of all linears, one after another, for a batch of images on `target`.

    Each linear was measured alone, quantization of its input included: what linears that share an
    input save together is not counted, nor is what lies between the linears. `share` raises
    `InputError` for what the table lacks (`engines/latency_bench.py` measures it).
    """

    def share(spec: LinearSpec, scheme: LayerScheme) -> float:
        rows = rows_of(spec, tokens, batch)
        return table.milliseconds(target, rows, spec.in_features, spec.out_features, scheme)

    return AdditiveCost("latency-ms", "ms per denoiser call", 0.0, tuple(linears), share)


@torch.inference_mode()
def tokens_per_image(model: DiffusionModel) -> int:
    """Tokens that the blocks see for one image, found by embedding one random image."""
    generator = torch.Generator().manual_seed(0)
    inputs = model.family.example_inputs(model.denoiser, 1, generator)
    moved = [value.to(model.device) for value in inputs]
    hidden_states = model.family.before_blocks(model.denoiser, *moved).hidden_states
    return int(hidden_states.shape[1])
