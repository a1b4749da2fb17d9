"""Each linear's weights quantized once for every group size that a search may give it.

Candidates are put together from these and never quantize anything themselves. GPTQ's Hessians come
from the full-precision model's inputs here, since a cached weight must serve whatever the other
layers are; the plan that a search finds goes through GPTQ proper afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ...errors import InputError
from ...files import sha256_of_json
from ...progress import Progress, Silent
from ..block_statistics import SharedInput, collect_hessians, shared_inputs
from ..block_store import BlockResult, BlockStore, LayerError
from ..blockwise import Method, layer_error, split_rows
from ..carried import CarriedInputs
from ..column_loop import ColumnLoops
from ..gptq import GptqSettings, factor_for, solve_groups
from ..hessian import exact_float32
from ..model import DiffusionModel
from ..plan import LinearSpec, QuantizationPlan
from ..quantizers import QuantizedWeight, quantize_weight_mse, quantize_weight_nearest
from ..schemes import LayerScheme, WeightGroup
from ..trajectories import CalibrationSet
from .space import SearchSpace

# Part of the key: raise it when the same inputs would give other weights.
CACHE_VERSION = 2
_SILENT = Silent()


@dataclass(frozen=True)
class WeightCache:
    """Quantized weights, on the CPU, by linear name and weight group, and each one's errors.

    `digest` names what made them: model, space, method and calibration set. Linears left at 16
    bits have no entry. Workers, who only run the weights, get no `errors`.
    """

    weights: Mapping[str, Mapping[WeightGroup, QuantizedWeight]]
    digest: str
    errors: Mapping[str, Mapping[WeightGroup, LayerError]] = field(default_factory=dict)


def build_weight_cache(
    model: DiffusionModel,
    space: SearchSpace,
    method: Method,
    calibration: CalibrationSet | None,
    *,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    progress: Progress = _SILENT,
    folder: Path | None = None,
    settings: GptqSettings | None = None,
) -> WeightCache:
    """Quantize every linear of `space` with each of its weight groups; the model is not changed.

    The denoiser moves to `device`. Each block runs once per batch for its Hessians and once for
    the next block's inputs; 'mse' and 'nearest' use the calibration set for the output errors only
    and can do without. With `folder`, finished blocks are kept there and taken over.
    Raises `InputError` for 'gptq' without a calibration set.
    """
    if method == "gptq" and calibration is None:
        raise InputError("gptq needs a calibration set, got none; collect one or use nearest")
    settings = settings or GptqSettings()
    key = _key(model, space, method, calibration, settings)
    store = None if folder is None else BlockStore(folder, key)
    model.denoiser.to(device)
    builder = _Builder(model, space, method, settings, progress)
    with torch.no_grad(), exact_float32():
        results = list(builder.run(calibration, batch_size, torch.device(device), store))
    weights: dict[str, dict[WeightGroup, QuantizedWeight]] = {}
    errors: dict[str, dict[WeightGroup, LayerError]] = {}
    for result in results:
        for label, weight in result.weights.items():
            name, _, size = label.rpartition("@")
            group: WeightGroup = int(size) if size.isdigit() else "channel"
            weights.setdefault(name, {})[group] = weight
            errors.setdefault(name, {})[group] = result.errors[label]
    return WeightCache(weights, key, errors)


def _key(
    model: DiffusionModel,
    space: SearchSpace,
    method: Method,
    calibration: CalibrationSet | None,
    settings: GptqSettings,
) -> str:
    return sha256_of_json(
        {
            "version": CACHE_VERSION,
            "space": {
                name: [scheme.weight_only().to_json() for scheme in _weight_schemes(space, name)]
                for name in space.choices
            },
            "method": method,
            "settings": asdict(settings),
            "calibration": None if calibration is None else calibration.digest,
            "source": asdict(model.source),
        }
    )


def _weight_schemes(space: SearchSpace, name: str) -> list[LayerScheme]:
    """The distinct weight sides of a linear's choices; none where it stays at 16 bits."""
    sides = dict.fromkeys(scheme.weight_only() for scheme in space.choices[name])
    return [side for side in sides if side.quantizes_weights]


class _Builder:
    """One run of `build_weight_cache`."""

    def __init__(
        self,
        model: DiffusionModel,
        space: SearchSpace,
        method: Method,
        settings: GptqSettings,
        progress: Progress,
    ) -> None:
        self._model = model
        self._space = space
        self._method = method
        self._settings = settings
        self._progress = progress
        self._loops = ColumnLoops()
        # full-precision inputs: an activation group must not decide a cached weight
        sides = {name: _weight_schemes(space, name) for name in space.choices}
        self._schemes = {name: schemes for name, schemes in sides.items() if schemes}
        self._plan = QuantizationPlan(
            space.bits, {name: schemes[0] for name, schemes in self._schemes.items()}
        )

    def run(
        self,
        calibration: CalibrationSet | None,
        batch_size: int,
        device: torch.device,
        store: BlockStore | None,
    ) -> Iterator[BlockResult]:
        family, denoiser = self._model.family, self._model.denoiser
        blocks = family.blocks(denoiser)
        finished = [] if store is None else store.finished(len(blocks))
        carried = None
        if calibration is not None and len(finished) < len(blocks):
            carried = CarriedInputs(self._model, calibration, batch_size, device)
        tracked = self._progress.track(blocks, "quantizing every group size", len(blocks))
        for number, block in enumerate(tracked):
            if number < len(finished):
                result = finished[number]
            else:
                result = self._block(number, carried)
                if store is not None:
                    store.write(number, result)
            if carried is not None and number + 1 < len(blocks):
                for batch, inputs in enumerate(carried):
                    carried.replace(batch, family.run_block(block, inputs))
            yield result

    def _block(self, number: int, carried: CarriedInputs | None) -> BlockResult:
        specs = [
            spec
            for spec in self._space.linears
            if spec.block == number and spec.name in self._schemes
        ]
        shared = shared_inputs(specs, self._plan)
        hessians: dict[str, Tensor] = {}
        if carried is not None and shared:
            block = self._model.family.blocks(self._model.denoiser)[number]
            accumulators = collect_hessians(
                self._model.family, self._model.denoiser, block, carried, shared, self._plan
            )
            hessians = {name: each.hessian() for name, each in accumulators.items()}
        result = BlockResult({}, {})
        for group in shared:
            self._input(group, hessians.get(group.name), result)
        return result

    def _input(self, group: SharedInput, hessian: Tensor | None, result: BlockResult) -> None:
        """All linears that read one input, those of equal choices stacked."""
        for specs in _by_schemes(group.specs, self._schemes):
            schemes = self._schemes[specs[0].name]
            originals = [self._weight(spec) for spec in specs]
            stacked = self._quantize(torch.cat(originals), schemes, hessian, group.name)
            for scheme, quantized in zip(schemes, stacked, strict=True):
                parts = split_rows(quantized, originals)
                for spec, original, part in zip(specs, originals, parts, strict=True):
                    label = f"{spec.name}@{scheme.weight_group}"
                    result.weights[label] = part.to("cpu")
                    result.errors[label] = layer_error(original, part, hessian)

    def _quantize(
        self, weight: Tensor, schemes: Sequence[LayerScheme], hessian: Tensor | None, name: str
    ) -> list[QuantizedWeight]:
        if self._method == "gptq" and hessian is not None:
            factor = factor_for(hessian, self._settings, name=name, progress=self._progress)
            return solve_groups(weight, factor, schemes, self._settings, self._loops)
        nearest = quantize_weight_mse if self._method == "mse" else quantize_weight_nearest
        return [nearest(weight, scheme) for scheme in schemes]

    def _weight(self, spec: LinearSpec) -> Tensor:
        linear = self._model.denoiser.get_submodule(spec.name)
        return linear.get_parameter("weight").detach().float()


def _by_schemes(
    specs: Sequence[LinearSpec], schemes: Mapping[str, Sequence[LayerScheme]]
) -> list[list[LinearSpec]]:
    groups: dict[tuple[LayerScheme, ...], list[LinearSpec]] = {}
    for spec in specs:
        groups.setdefault(tuple(schemes[spec.name]), []).append(spec)
    return list(groups.values())
