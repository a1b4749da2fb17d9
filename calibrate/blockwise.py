"""Quantize a model block by block, each on the inputs that the quantized blocks before it give.

Every calibration batch goes through a block for its statistics and, once it is quantized, through
it again to make the next block's inputs, which are carried along: the model as a whole never
runs. Memory holds one block's Hessians at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..files import sha256_of_json
from ..progress import Progress, Silent
from .block_statistics import SharedInput, collect_hessians, shared_inputs
from .block_store import BlockResult, BlockStore, LayerError
from .carried import CarriedInputs
from .column_loop import ColumnLoops
from .gptq import GptqSettings, factor_for, solve_groups
from .hessian import InverseFactor, exact_float32
from .model import DiffusionModel
from .plan import LinearSpec, QuantizationPlan
from .quantizers import QuantizedWeight, quantize_weight_mse, quantize_weight_nearest
from .schemes import LayerScheme
from .simulate import install_quantized_linears
from .trajectories import CalibrationSet

Method = Literal["gptq", "mse", "nearest"]

# Part of the resume key: raise it when the same inputs would give other weights.
RESULTS_VERSION = 2
_SILENT = Silent()


@dataclass(frozen=True)
class QuantizationResult:
    """Quantized weights, on the CPU, and errors, both by linear name in model order."""

    weights: Mapping[str, QuantizedWeight]
    errors: Mapping[str, LayerError]


def quantize_model(
    model: DiffusionModel,
    plan: QuantizationPlan,
    method: Method,
    calibration: CalibrationSet | None,
    *,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    progress: Progress = _SILENT,
    folder: Path | None = None,
    settings: GptqSettings | None = None,
    compare_scales: bool = False,
) -> QuantizationResult:
    """Quantize the plan's linears; afterwards `model.denoiser` **is** the quantized simulation.

    In place: the denoiser moves to `device`, and its quantized linears become `QuantizedLinear`.
    16-bit linears stay as they are and have no entry in the result.
    'gptq' needs a calibration set. 'mse' and 'nearest' use one for the output errors only;
    without one no forward pass is made.
    With `compare_scales`, linears with integer scales are also quantized with float scales of the
    same groups, for the errors of these alone (`LayerError.float_scales`).
    With `folder`, finished blocks are kept there and taken over by a run of the same plan, method,
    settings, calibration set and model; other leftovers are overwritten.
    Raises `InputError` for a plan that does not fit, an unknown method, or a set that is missing.
    """
    plan.check(model.linears)
    if method not in get_args(Method):
        raise InputError(f"weights must be one of {', '.join(get_args(Method))}, got {method!r}")
    if method == "gptq" and calibration is None:
        raise InputError(
            "gptq needs a calibration set, got none; collect one or use mse or nearest"
        )
    settings = settings or GptqSettings()
    model.denoiser.to(device)
    store = None
    if folder is not None:
        key = _resume_key(model, plan, method, calibration, settings, compare_scales)
        store = BlockStore(folder, key)
    job = _Job(model, plan, method, settings, compare_scales, progress)
    with torch.no_grad(), exact_float32():
        return job.run(calibration, batch_size, torch.device(device), store)


def _resume_key(
    model: DiffusionModel,
    plan: QuantizationPlan,
    method: Method,
    calibration: CalibrationSet | None,
    settings: GptqSettings,
    compare_scales: bool,
) -> str:
    return sha256_of_json(
        {
            "version": RESULTS_VERSION,
            "plan": plan.digest,
            "method": method,
            "settings": asdict(settings),
            "compare_scales": compare_scales,
            "calibration": None if calibration is None else calibration.digest,
            "source": asdict(model.source),
        }
    )


class _Job:
    """One run of `quantize_model`."""

    def __init__(
        self,
        model: DiffusionModel,
        plan: QuantizationPlan,
        method: Method,
        settings: GptqSettings,
        compare_scales: bool,
        progress: Progress,
    ) -> None:
        self._model = model
        self._denoiser = model.denoiser
        self._plan = plan
        self._method = method
        self._settings = settings
        self._compare_scales = compare_scales
        self._progress = progress
        self._loops = ColumnLoops()
        self._specs: dict[int, list[LinearSpec]] = {}
        for spec in model.linears:
            self._specs.setdefault(spec.block, []).append(spec)

    def run(
        self,
        calibration: CalibrationSet | None,
        batch_size: int,
        device: torch.device,
        store: BlockStore | None,
    ) -> QuantizationResult:
        blocks = self._model.family.blocks(self._denoiser)
        finished = [] if store is None else store.finished(len(blocks))
        if finished:
            self._progress.say(f"{len(finished)} of {len(blocks)} blocks were quantized before")
        carried = None
        if calibration is not None and len(finished) < len(blocks):
            carried = CarriedInputs(self._model, calibration, batch_size, device)
        weights: dict[str, QuantizedWeight] = {}
        errors: dict[str, LayerError] = {}
        numbers = range(len(blocks))
        for number in self._progress.track(numbers, "quantizing blocks", len(blocks)):
            if number < len(finished):
                result = finished[number]
            else:
                result = self._quantize_block(blocks[number], number, carried)
                if store is not None:
                    store.write(number, result)
            install_quantized_linears(self._denoiser, self._plan.layers, result.weights)
            weights |= result.weights
            errors |= result.errors
            if carried is not None and number + 1 < len(blocks):
                for batch, inputs in enumerate(carried):
                    carried.replace(batch, self._model.family.run_block(blocks[number], inputs))
        return QuantizationResult(weights, errors)

    def _quantize_block(
        self, block: nn.Module, number: int, carried: CarriedInputs | None
    ) -> BlockResult:
        shared = shared_inputs(self._specs.get(number, []), self._plan)
        result = BlockResult({}, {})
        hessians = {}
        if carried is not None and shared:
            hessians = collect_hessians(
                self._model.family, self._denoiser, block, carried, shared, self._plan
            )
        for group in shared:
            accumulator = hessians.pop(group.name, None)
            hessian = None if accumulator is None else accumulator.hessian()
            self._quantize_group(group, hessian, result)
        order = [spec.name for spec in self._specs.get(number, []) if spec.name in result.weights]
        return BlockResult(
            {name: result.weights[name].to("cpu") for name in order},
            {name: result.errors[name] for name in order},
        )

    def _quantize_group(
        self, group: SharedInput, hessian: Tensor | None, result: BlockResult
    ) -> None:
        """Quantize linears of one input; those of equal schemes are stacked and solved at once."""
        factor = None
        if self._method == "gptq" and hessian is not None:
            factor = factor_for(hessian, self._settings, name=group.name, progress=self._progress)
        for specs in _by_weight_scheme(group.specs, self._plan):
            originals = [self._weight(spec.name) for spec in specs]
            schemes = self._schemes(self._plan[specs[0].name])
            parts = [
                split_rows(quantized, originals)
                for quantized in self._quantize(torch.cat(originals), schemes, factor)
            ]
            for spec, original, own, *others in zip(specs, originals, *parts, strict=True):
                error = layer_error(original, own, hessian)
                for other in others:
                    float_scales = layer_error(original, other, hessian)
                    error = replace(error, float_scales=float_scales)
                result.weights[spec.name] = own
                result.errors[spec.name] = error

    def _schemes(self, scheme: LayerScheme) -> list[LayerScheme]:
        """The scheme, and the one to compare it with if there is any."""
        if self._compare_scales and scheme.has_integer_scales:
            return [scheme, scheme.with_float_scales()]
        return [scheme]

    def _weight(self, name: str) -> Tensor:
        return self._denoiser.get_submodule(name).get_parameter("weight").detach().float()

    def _quantize(
        self, weight: Tensor, schemes: Sequence[LayerScheme], factor: InverseFactor | None
    ) -> list[QuantizedWeight]:
        if factor is not None:
            return solve_groups(weight, factor, schemes, self._settings, self._loops)
        nearest = quantize_weight_mse if self._method == "mse" else quantize_weight_nearest
        return [nearest(weight, scheme) for scheme in schemes]


def _by_weight_scheme(
    specs: Sequence[LinearSpec], plan: QuantizationPlan
) -> list[list[LinearSpec]]:
    groups: dict[object, list[LinearSpec]] = {}
    for spec in specs:
        groups.setdefault(plan[spec.name].weight_only(), []).append(spec)
    return list(groups.values())


def split_rows(quantized: QuantizedWeight, like: Sequence[Tensor]) -> list[QuantizedWeight]:
    """The parts of stacked linears, each with tensors of its own."""
    if len(like) == 1:
        return [quantized]
    parts, start = [], 0
    for weight in like:
        stop = start + weight.shape[0]
        parts.append(quantized.with_each(partial(_copy_of_rows, start=start, stop=stop)))
        start = stop
    return parts


def _copy_of_rows(tensor: Tensor, *, start: int, stop: int) -> Tensor:
    return tensor[start:stop].clone()


def layer_error(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor | None) -> LayerError:
    """‖D‖/‖W‖ and sqrt(tr(D H Dᵀ) / tr(W H Wᵀ)) with D = W − Ŵ: H stands for the inputs."""
    difference = weight - quantized.dequantize()
    relative = _ratio(difference.square().sum(), weight.square().sum())
    if hessian is None:
        return LayerError(relative, None)
    return LayerError(relative, _ratio(_energy(difference, hessian), _energy(weight, hessian)))


def _energy(rows: Tensor, hessian: Tensor) -> Tensor:
    return (rows @ hessian).mul_(rows).sum()


def _ratio(part: Tensor, whole: Tensor) -> float:
    """sqrt(part / whole); 0 for 0/0 (an all-zero layer is exact)."""
    return (part.double().clamp(min=0) / whole.double().clamp(min=1e-300)).sqrt().item()
