"""Which targets are written, and by which plan: settled before any work starts.

`tensorrt` stands for the target that changes the plan least, in this order: `tensorrt-int4` for
weight-only plans (TensorRT's own kernels, the plan's exact weights), `tensorrt-plugin` (the plan's
exact meaning), `tensorrt-int8` (static scales in place of dynamic ones).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ...calibrate.plan import LinearSpec, QuantizationPlan
from ...errors import InputError
from ...export.capabilities import TARGETS, Refusal, check, nearest_plan
from ...export.tensorrt.versions import Features, TensorRtVersion, features
from ..tensorrt.library import installed_version
from .onnxruntime_files import ONNXRUNTIME_FILES
from .onnxruntime_target import notes_for
from .options import BEST, REFERENCE, TargetOptions

_PREFERENCE = ("tensorrt-int4", "tensorrt-plugin", "tensorrt-int8")
# What files are written for where no TensorRT is installed and no --tensorrt-version was given.
_NEWEST = TensorRtVersion(11)


@dataclass(frozen=True)
class Choice:
    """What an export will write.

    targets: resolved names, `qdq` left out; asked: the name that each was asked for by;
    plan: the one that all of them express; features: of the TensorRT that files are written for;
    notes: what was decided here and a person should know.
    """

    targets: tuple[str, ...]
    asked: dict[str, str]
    plan: QuantizationPlan
    features: Features
    notes: tuple[str, ...] = ()

    @property
    def needs_scales(self) -> bool:
        """Whether static activation scales have to be calibrated."""
        return "tensorrt-int8" in self.targets


def choose(options: TargetOptions, plan: QuantizationPlan, linears: Sequence[LinearSpec]) -> Choice:
    """Resolve `--target` for a plan. Raises `InputError` for what a target cannot express."""
    options.check_targets()
    version = target_version(options)
    degrade = options.on_unsupported == "degrade"
    asked: dict[str, str] = {}
    notes: list[str] = []
    made = plan
    for name in options.target:
        resolved = _best(plan, linears, version, degrade=degrade) if name == BEST else name
        if resolved == REFERENCE or resolved in asked:
            continue
        asked[resolved] = name
        if name == BEST:
            notes.append(f"tensorrt is {resolved}: the nearest to the plan that {version} runs")
        made = _fitting(made, linears, resolved, version, notes, degrade=degrade)
    for name in asked:
        if name in ONNXRUNTIME_FILES:
            notes += notes_for(made, linears, name)
    for name in asked:  # what one target needed may be what another cannot run
        if refusals := _refusals(made, linears, name, version):
            raise InputError(
                f"no one plan fits {', '.join(asked)}: {_words(name, refusals)}; export them into "
                "folders of their own"
            )
    return Choice(tuple(asked), asked, made, features(version), tuple(notes))


def target_version(options: TargetOptions) -> TensorRtVersion:
    """The TensorRT that files are written for: as asked, else as installed, else the newest."""
    if options.tensorrt_version is not None:
        return TensorRtVersion.parse(options.tensorrt_version)
    try:
        return installed_version()
    except InputError:
        return _NEWEST


def _best(
    plan: QuantizationPlan,
    linears: Sequence[LinearSpec],
    version: TensorRtVersion,
    *,
    degrade: bool,
) -> str:
    found = {name: _refusals(plan, linears, name, version) for name in _PREFERENCE}
    fitting = [name for name in _PREFERENCE if not found[name]]
    if fitting:
        return fitting[0]
    degradable = [name for name in _PREFERENCE if not _needs_newer(name, version)]
    if degrade and degradable:
        return min(degradable, key=lambda name: len(found[name]))
    reasons = "; ".join(_words(name, refusals) for name, refusals in found.items())
    raise InputError(
        f"no TensorRT target runs this plan: {reasons}; change the scheme, or take the nearest "
        "plan with --on-unsupported degrade"
    )


def _fitting(
    plan: QuantizationPlan,
    linears: Sequence[LinearSpec],
    target: str,
    version: TensorRtVersion,
    notes: list[str],
    *,
    degrade: bool,
) -> QuantizationPlan:
    """The plan, or the nearest that the target can express where that is allowed."""
    refusals = _refusals(plan, linears, target, version)
    if not refusals:
        return plan
    if _needs_newer(target, version):
        raise InputError(refusals[0].reason)
    nearest = nearest_plan(plan, linears, target)
    changes = _changes(plan, nearest)
    if not degrade:
        raise InputError(
            f"{_words(target, refusals)}. The nearest plan that it can run: {changes}; take it "
            "with --on-unsupported degrade, or change the scheme"
        )
    notes.append(f"{target} cannot run the plan as given; degraded: {changes}")
    return nearest


def _refusals(
    plan: QuantizationPlan, linears: Sequence[LinearSpec], target: str, version: TensorRtVersion
) -> list[Refusal]:
    if TARGETS[target].realize is not None:
        return []  # it writes every plan; what it does otherwise is said in notes
    return check(plan, linears, target, str(version) if target.startswith(BEST) else None)


def _needs_newer(target: str, version: TensorRtVersion) -> bool:
    return version < TARGETS[target].oldest


def _words(target: str, refusals: Sequence[Refusal]) -> str:
    first = refusals[0]
    more = f" (and {len(refusals) - 1} more)" if len(refusals) > 1 else ""
    return f"target {target} cannot run {first.layer}: {first.reason}{more}"


def _changes(plan: QuantizationPlan, nearest: QuantizationPlan) -> str:
    """'12 linears w4a8 g128 → w4 g128'."""
    pairs = Counter(
        (scheme.label, nearest[name].label)
        for name, scheme in plan.layers.items()
        if nearest[name] != scheme
    )
    return ", ".join(f"{count} linears {old} → {new}" for (old, new), count in pairs.items())
