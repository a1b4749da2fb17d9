"""The search space: for each linear, the pairs of a weight and an activation group it may take.

A genome is one position a linear in that linear's list of choices (Q-DiT, arXiv 2406.17343,
Algorithm 1, with the two groups kept apart; `tied` gives the paper's one size for both).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

from ...errors import InputError
from ...files import sha256_of_json
from ..plan import LinearSpec, QuantizationPlan
from ..schemes import GROUP_SIZES, ActivationGroup, LayerScheme, WeightGroup

SearchGroup = int | Literal["channel"]
# A reason why a layer cannot take a scheme, or None: `export/capabilities.py` knows the targets'.
Refuse = Callable[[LinearSpec, LayerScheme], str | None]

ALL_GROUPS: tuple[SearchGroup, ...] = (*GROUP_SIZES, "channel")


def never(spec: LinearSpec, scheme: LayerScheme) -> str | None:
    """Refuses nothing."""
    return None


@dataclass(frozen=True)
class SearchSpace:
    """Choices by linear name, in model order; each linear's finest first, without duplicates.

    The order of choices is by weight group size, then by activation group size, both in channels
    ('channel' and 'token' count K). `bits` labels the plans ('w4a8').
    """

    linears: tuple[LinearSpec, ...]
    choices: Mapping[str, tuple[LayerScheme, ...]]
    bits: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", MappingProxyType(dict(self.choices)))
        if tuple(self.choices) != tuple(spec.name for spec in self.linears):
            raise ValueError("choices must name every linear, in model order")
        for name, schemes in self.choices.items():
            if not schemes or len(set(schemes)) != len(schemes):
                raise ValueError(f"{name} must have at least one choice and none twice")

    def __reduce__(self) -> tuple[Any, ...]:  # MappingProxyType does not pickle; workers need it
        return (SearchSpace, (self.linears, dict(self.choices), self.bits))

    def __hash__(self) -> int:
        return hash(self.digest)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the linears' shapes, the choices and the label."""
        shapes = [[s.name, s.role, s.in_features, s.out_features] for s in self.linears]
        choices = [[scheme.to_json() for scheme in self.choices[s.name]] for s in self.linears]
        return sha256_of_json({"bits": self.bits, "linears": shapes, "choices": choices})

    @cached_property
    def _positions(self) -> tuple[dict[LayerScheme, int], ...]:
        return tuple(
            {scheme: position for position, scheme in enumerate(self.choices[spec.name])}
            for spec in self.linears
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many choices each linear has: a gene's values are 0 … size−1."""
        return tuple(len(schemes) for schemes in self.choices.values())

    def plan(self, genome: Sequence[int]) -> QuantizationPlan:
        """The plan in which each linear takes the choice at its gene."""
        if len(genome) != len(self.linears):
            raise InputError(
                f"a genome must have one gene a linear ({len(self.linears)}), got {len(genome)}; "
                "make it for this space"
            )
        layers = {}
        for gene, (name, schemes) in zip(genome, self.choices.items(), strict=True):
            if not 0 <= gene < len(schemes):
                raise InputError(
                    f"the gene of {name} must be in 0 … {len(schemes) - 1}, got {gene}; "
                    "make the genome for this space"
                )
            layers[name] = schemes[gene]
        return QuantizationPlan(self.bits, layers)

    def genome(self, plan: QuantizationPlan) -> tuple[int, ...]:
        """The inverse of `plan`. Raises `InputError` for a plan outside the space."""
        genes = []
        for spec, positions in zip(self.linears, self._positions, strict=True):
            scheme = plan.layers.get(spec.name)
            if scheme is not None:
                scheme = canonical_scheme(scheme, spec.in_features)
            if scheme not in positions:
                got = "no scheme" if scheme is None else scheme.label
                raise InputError(
                    f"the plan must lie in the search space, got {got} for {spec.name}; "
                    f"use one of its {len(positions)} choices"
                )
            genes.append(positions[scheme])
        return tuple(genes)

    def uniform(self, group: SearchGroup) -> tuple[int, ...]:
        """The genome with `group` on both sides of every linear, or the nearest choice to it.

        'Nearest' is by the sum of both sides' distances in log2 of the size; the finer one wins.
        """
        genes = []
        for spec in self.linears:
            k = spec.in_features
            wanted = math.log2(k if group == "channel" else group)
            distances = [
                abs(math.log2(scheme.weight_group_size(k)) - wanted)
                + (
                    abs(math.log2(scheme.activation_group_size(k)) - wanted)
                    if scheme.quantizes_activations
                    else 0.0
                )
                for scheme in self.choices[spec.name]
            ]
            genes.append(distances.index(min(distances)))
        return tuple(genes)

    def weight_groups(self, name: str) -> tuple[WeightGroup, ...]:
        """The distinct weight groups among a linear's choices, finest first."""
        schemes = self.choices[name]
        return tuple(dict.fromkeys(s.weight_group for s in schemes if s.quantizes_weights))

    def activation_groups(self, name: str) -> tuple[ActivationGroup, ...]:
        """The distinct activation groups, finest first; empty where the linear is weight-only."""
        schemes = (s for s in self.choices[name] if s.quantizes_activations)
        k = next(spec.in_features for spec in self.linears if spec.name == name)
        groups = dict.fromkeys(scheme.activation_group for scheme in schemes)
        return tuple(sorted(groups, key=lambda group: k if group == "token" else group))


def search_space(
    linears: Sequence[LinearSpec],
    scheme: LayerScheme,
    bits: str,
    *,
    refuse: Refuse = never,
    tied: bool = False,
    groups: Sequence[SearchGroup] | None = None,
) -> SearchSpace:
    """Every choice that each linear may take; all but the groups comes from `scheme`.

    1. A side's groups are those of `groups` (default: all of `GROUP_SIZES`, and 'channel') that
       divide K; one equal to K is written 'channel' or 'token'.
    2. `tied`: one size for both sides, as the paper has it.
    3. adaLN linears are weight-only; a 16-bit side has no choice.
    4. Choices for which `refuse` gives a reason are left out.

    Raises `InputError` for an unknown group and for a linear that is left without a choice.
    """
    wanted = _checked_groups(groups)
    choices = {spec.name: _choices(spec, scheme, wanted, refuse, tied) for spec in linears}
    return SearchSpace(tuple(linears), choices, bits)


def _checked_groups(groups: Sequence[SearchGroup] | None) -> tuple[SearchGroup, ...]:
    if groups is None:
        return ALL_GROUPS
    for group in groups:
        if isinstance(group, bool) or group not in ALL_GROUPS:
            known = ", ".join(map(str, ALL_GROUPS))
            raise InputError(f"search groups must be among {known}, got {group!r}")
    if not groups:
        raise InputError("search groups must name at least one size, got none; leave them out")
    return tuple(groups)


def _choices(
    spec: LinearSpec,
    scheme: LayerScheme,
    groups: tuple[SearchGroup, ...],
    refuse: Refuse,
    tied: bool,
) -> tuple[LayerScheme, ...]:
    base = scheme.weight_only() if spec.role == "adaln" else scheme
    k = spec.in_features
    sizes = sorted({k if g == "channel" else g for g in groups if g == "channel" or k % g == 0})
    if not sizes and base.quantizes_weights:
        raise InputError(
            f"no search group divides the {k} input channels of {spec.name}, got "
            f"{', '.join(map(str, groups))}; add 'channel' or a divisor of {k}"
        )
    made = [_with_sizes(base, k, *pair) for pair in _size_pairs(base, sizes, tied)]
    reasons = {choice: refuse(spec, choice) for choice in made}
    kept = tuple(choice for choice, reason in reasons.items() if reason is None)
    if not kept:
        reason = next(iter(reasons.values()))
        raise InputError(
            f"a searched linear needs at least one scheme that the targets can run, got none for "
            f"{spec.name} ({base.weight_bits}/{base.activation_bits} bits): {reason}; "
            "choose other bits, groups or targets"
        )
    return kept


def _size_pairs(base: LayerScheme, sizes: list[int], tied: bool) -> list[tuple[int, int]]:
    """(weight, activation) sizes; a 16-bit side's size is a placeholder."""
    if not base.quantizes_weights:
        return [(0, 0)]
    if tied or not base.quantizes_activations:
        return [(size, size) for size in sizes]
    return [(weight, activation) for weight in sizes for activation in sizes]


def canonical_scheme(scheme: LayerScheme, in_features: int) -> LayerScheme:
    """The scheme with a group of all K channels written 'channel' or 'token', as choices are."""
    k = in_features
    return _with_sizes(scheme, k, scheme.weight_group_size(k), scheme.activation_group_size(k))


def _with_sizes(base: LayerScheme, k: int, weight: int, activation: int) -> LayerScheme:
    if not base.quantizes_weights:
        return base
    return replace(
        base,
        weight_group="channel" if weight == k else weight,
        activation_group="token" if activation == k else activation,
    )
