"""One block's calibration statistics: the Hessian of every distinct quantized input.

Linears that read the same tensor through the same activation quantizer (q, k and v) share one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .families.base import BlockInputs, Family
from .hessian import HessianAccumulator
from .plan import LinearSpec, QuantizationPlan
from .simulate import QuantizedInputLinear, replace_linear


@dataclass(frozen=True)
class SharedInput:
    """Linears of one block that see the very same quantized input [..., K]."""

    specs: tuple[LinearSpec, ...]

    @property
    def name(self) -> str:
        return self.specs[0].name

    @property
    def in_features(self) -> int:
        return self.specs[0].in_features


def shared_inputs(specs: Iterable[LinearSpec], plan: QuantizationPlan) -> list[SharedInput]:
    """Group the linears with quantized weights by input tensor and activation quantizer."""
    groups: dict[tuple[Any, ...], list[LinearSpec]] = {}
    for spec in specs:
        scheme = plan[spec.name]
        if scheme.quantizes_weights:
            activation = (
                scheme.activation_bits,
                scheme.activation_group,
                scheme.activation_symmetric,
            )
            groups.setdefault((spec.input_name, *activation), []).append(spec)
    return [SharedInput(tuple(group)) for group in groups.values()]


class _AllSeen(Exception):  # noqa: N818 - no error: the rest of the block has nothing to tell
    """Raised by the last hook to leave the block early."""


def collect_hessians(
    family: Family,
    denoiser: nn.Module,
    block: nn.Module,
    inputs: Iterable[BlockInputs],
    shared: Sequence[SharedInput],
    plan: QuantizationPlan,
) -> dict[str, HessianAccumulator]:
    """Run `block` on all `inputs` with quantized activations; accumulators by `SharedInput.name`.

    The run of each batch ends as soon as the last of `shared` has its input, so in particular
    the block's last linear is never multiplied. The block is left as it was.
    """
    accumulators: dict[str, HessianAccumulator] = {}
    with quantized_inputs(denoiser, [spec for group in shared for spec in group.specs], plan):
        waiting: set[str] = set()
        handles = []
        for group in shared:
            linear = denoiser.get_submodule(group.name).get_submodule("linear")
            accumulator = HessianAccumulator(group.in_features, _device(linear))
            accumulators[group.name] = accumulator
            hook = _recorder(group.name, accumulator, waiting)
            handles.append(linear.register_forward_pre_hook(hook))
        try:
            for batch in inputs:
                waiting.update(accumulators)
                try:
                    family.run_block(block, batch)
                except _AllSeen:
                    continue
        finally:
            for handle in handles:
                handle.remove()
    return accumulators


@contextmanager
def quantized_inputs(
    denoiser: nn.Module, specs: Iterable[LinearSpec], plan: QuantizationPlan
) -> Iterator[None]:
    """Quantize the inputs of `specs` inside, with full-precision weights."""
    originals = {spec.name: denoiser.get_submodule(spec.name) for spec in specs}
    try:
        for name, linear in originals.items():
            replacement = QuantizedInputLinear(plan[name], linear)  # type: ignore[arg-type]
            replace_linear(denoiser, name, replacement)
        yield
    finally:
        for name, linear in originals.items():
            replace_linear(denoiser, name, linear)


def _recorder(
    name: str, accumulator: HessianAccumulator, waiting: set[str]
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def record(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        accumulator.add(arguments[0])
        waiting.discard(name)
        if not waiting:
            raise _AllSeen

    return record


def _device(module: nn.Module) -> Any:
    return next(module.parameters()).device
