"""What each target makes of a plan: checked before calibration, never degraded silently.

`docs/targets.md` has the table in words and says which facts are tested here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from ..calibrate.plan import LinearSpec, QuantizationPlan
from ..errors import InputError
from . import target_rules as rules
from .onnxruntime import cuda_rules as cuda
from .onnxruntime import rules as onnxruntime
from .realization import Realization, Realize, as_in_the_reference


@dataclass(frozen=True)
class Refusal:
    """One linear that a target's own operators do not run as planned."""

    layer: str
    reason: str


@dataclass(frozen=True)
class Target:
    """A way to run a quantized model. `oldest` is the oldest runtime version that can.

    `built` says whether this version of qdit writes it; the rules of the others are known already.
    `changes` is what a file of this target does otherwise than the plan says, '' for nothing.
    `realize` says what a linear becomes, where the target writes every plan: what it refuses is
    then in the form of the reference or more precise than planned, and said to be. Where it is
    None, a refused linear cannot be run at all.
    """

    name: str
    runtime: str
    oldest: tuple[int, ...]
    built: bool
    refuse: rules.Rule
    nearest: rules.Nearest
    changes: str = ""
    realize: Realize | None = None


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        target.name: target
        for target in (
            Target(
                "qdq", "ONNX Runtime", (1, 22), True,
                rules.nothing_refused, rules.as_it_is, realize=as_in_the_reference,
            ),
            Target(
                "onnxruntime", "ONNX Runtime", (1, 22), True,
                onnxruntime.refuse_onnxruntime, onnxruntime.nearest_onnxruntime,
                realize=onnxruntime.realize_onnxruntime,
            ),
            Target(
                "onnxruntime-cuda", "ONNX Runtime", (1, 22), True,
                cuda.refuse_onnxruntime_cuda, cuda.nearest_onnxruntime_cuda,
                realize=cuda.realize_onnxruntime_cuda,
            ),
            Target(
                "tensorrt-plugin", "TensorRT", (10, 9), True,
                rules.refuse_tensorrt_plugin, rules.nearest_tensorrt_plugin,
            ),
            Target(
                "tensorrt-int8", "TensorRT", (8, 6), True,
                rules.refuse_tensorrt_int8, rules.nearest_tensorrt_int8,
                "one calibrated activation scale a tensor in place of one a token at run time",
            ),
            Target(
                "tensorrt-int4", "TensorRT", (10, 0), True,
                rules.refuse_tensorrt_int4, rules.nearest_tensorrt_int4,
            ),
        )
    }
)  # fmt: skip


def target_named(name: str) -> Target:
    """The target of that name, or `InputError` with the names there are."""
    if name not in TARGETS:
        raise InputError(f"target must be one of {', '.join(TARGETS)}, got {name!r}")
    return TARGETS[name]


def built_targets() -> tuple[str, ...]:
    """The targets that this version writes, the reference first."""
    return tuple(name for name, target in TARGETS.items() if target.built)


def realizations(
    plan: QuantizationPlan, linears: Sequence[LinearSpec], target: str
) -> dict[str, Realization]:
    """What each linear becomes in `target`'s file, by name in model order.

    Raises `InputError` for a target without such rules: one that refuses instead.
    """
    chosen = target_named(target)
    if chosen.realize is None:
        raise InputError(f"target {target} does not write every plan; use check()")
    return {spec.name: chosen.realize(spec, plan[spec.name]) for spec in linears}


def computed_plan(
    plan: QuantizationPlan, linears: Sequence[LinearSpec], target: str
) -> QuantizationPlan:
    """The plan that `target`'s file computes: `plan`, but for activation groups that got finer."""
    made = realizations(plan, linears, target)
    layers = {name: realization.scheme for name, realization in made.items()}
    return plan if layers == dict(plan.layers) else QuantizationPlan(plan.bits, layers)


def check(
    plan: QuantizationPlan,
    linears: Sequence[LinearSpec],
    target: str,
    version: str | None = None,
) -> list[Refusal]:
    """Every linear of `plan` that `target` does not run as planned, in model order.

    `version` is the runtime's ('10.9', '8.6.0'); without it only the schemes are checked.
    """
    chosen = target_named(target)
    if version is not None and _parse(version) < chosen.oldest:
        oldest = ".".join(map(str, chosen.oldest))
        reason = f"{target} needs {chosen.runtime} {oldest} or newer, got {version}"
        return [Refusal(s.name, reason) for s in linears if plan[s.name].quantizes_weights]
    refusals = []
    for spec in linears:
        reason_or_none = chosen.refuse(spec, plan[spec.name])
        if reason_or_none is not None:
            refusals.append(Refusal(spec.name, reason_or_none))
    return refusals


def nearest_plan(
    plan: QuantizationPlan, linears: Sequence[LinearSpec], target: str
) -> QuantizationPlan:
    """The plan itself if `target` can express it, else the nearest that it can.

    Only refused layers change (`target_rules.py` says how); the result's label is 'custom' then.
    """
    chosen = target_named(target)
    layers = dict(plan.layers)
    for spec in linears:
        scheme = layers[spec.name]
        if chosen.refuse(spec, scheme) is not None:
            layers[spec.name] = chosen.nearest(spec, scheme)
    if layers == dict(plan.layers):
        return plan
    nearest = QuantizationPlan("custom", layers)
    nearest.check(linears)
    return nearest


def _parse(version: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in version.split("+")[0].split(".")[:3])
    except ValueError as error:
        raise InputError(f"a version must look like 10.9 or 8.6.0, got {version!r}") from error
