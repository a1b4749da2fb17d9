"""Which group sizes each linear may take."""

from __future__ import annotations

import itertools
from copy import deepcopy

import pytest

from qdit.calibrate.plan import LinearSpec, QuantizationPlan, uniform_plan
from qdit.calibrate.schemes import GROUP_SIZES, LayerScheme
from qdit.calibrate.search.space import SearchSpace, search_space
from qdit.errors import InputError

Q, ADALN, DOWN = (
    f"transformer_blocks.0.{path}" for path in ("attn1.to_q", "norm1.linear", "ff.net.2")
)
SCHEME = LayerScheme()


@pytest.fixture(scope="module")
def space(linears: list[LinearSpec]) -> SearchSpace:
    return search_space(linears, SCHEME, "w4a8")


def sizes(space: SearchSpace, name: str) -> list[tuple[int, int]]:
    k = next(spec.in_features for spec in space.linears if spec.name == name)
    return [(s.weight_group_size(k), s.activation_group_size(k)) for s in space.choices[name]]


def test_every_pair_of_divisors_finest_first(space: SearchSpace) -> None:
    divisors = [g for g in GROUP_SIZES if 192 % g == 0]
    assert divisors == [32, 64, 96, 192]
    assert sizes(space, Q) == list(itertools.product(divisors, divisors))


def test_a_group_of_all_channels_is_written_channel_and_token(space: SearchSpace) -> None:
    assert space.weight_groups(Q) == (32, 64, 96, "channel")
    assert space.activation_groups(Q) == (32, 64, 96, "token")
    assert 192 in space.weight_groups(DOWN)
    assert space.weight_groups(DOWN)[-1] == "channel"


def test_adaln_is_weight_only(space: SearchSpace) -> None:
    assert space.activation_groups(ADALN) == ()
    assert [s.weight_group for s in space.choices[ADALN]] == [32, 64, 96, "channel"]
    assert not any(s.quantizes_activations for s in space.choices[ADALN])


def test_integer_scales_are_carried_to_every_choice_that_has_groups(
    linears: list[LinearSpec], space: SearchSpace
) -> None:
    integer = search_space(linears, LayerScheme(scale_format="integer"), "w4a8")
    assert integer.sizes == space.sizes
    assert integer.digest != space.digest
    for choices in integer.choices.values():
        for scheme in choices:
            assert scheme.has_integer_scales == (scheme.weight_group != "channel")
    plan = integer.plan(integer.uniform(64))
    assert integer.genome(plan) == integer.uniform(64)
    with pytest.raises(InputError, match=f"got w4 g64 · a16 for {ADALN}"):
        integer.genome(space.plan(space.uniform(64)))


def test_sixteen_bit_sides_have_no_choice(linears: list[LinearSpec]) -> None:
    weight_only = search_space(linears, SCHEME.weight_only(), "w4a16")
    assert [s.weight_group for s in weight_only.choices[Q]] == [32, 64, 96, "channel"]
    nothing = search_space(linears, LayerScheme(weight_bits=16, activation_bits=16), "w16a16")
    assert set(nothing.sizes) == {1}
    assert nothing.weight_groups(Q) == ()


def test_tied_is_the_papers_one_size(linears: list[LinearSpec]) -> None:
    tied = search_space(linears, SCHEME, "w4a8", tied=True, groups=(32, 64, 128, 192, 288))
    assert sizes(tied, Q) == [(32, 32), (64, 64), (192, 192)]
    assert sizes(tied, DOWN) == [(32, 32), (64, 64), (128, 128), (192, 192)]


def test_refused_choices_are_left_out(linears: list[LinearSpec]) -> None:
    def refuse(spec: LinearSpec, scheme: LayerScheme) -> str | None:
        return None if scheme.activation_group in (32, "token") else "no such kernel"

    assert search_space(linears, SCHEME, "w4a8", refuse=refuse).activation_groups(Q) == (
        32,
        "token",
    )


def test_a_linear_without_a_choice_is_named_with_the_reason(linears: list[LinearSpec]) -> None:
    with pytest.raises(InputError, match=rf"none for {ADALN} .*no kernel; choose other bits"):
        search_space(linears, SCHEME, "w4a8", refuse=lambda spec, scheme: "no kernel")
    with pytest.raises(InputError, match=r"no search group divides the 192 .* got 128; add"):
        search_space(linears, SCHEME, "w4a8", groups=(128,))


@pytest.mark.parametrize("groups", [(100,), (True,), ("token",), ()], ids=str)
def test_unknown_groups_are_refused(linears: list[LinearSpec], groups: tuple) -> None:
    with pytest.raises(InputError, match="search groups must"):
        search_space(linears, SCHEME, "w4a8", groups=groups)


def test_plan_and_genome_are_inverse_and_fit_the_model(
    space: SearchSpace, linears: list[LinearSpec]
) -> None:
    genome = tuple(size // 2 for size in space.sizes)
    plan = space.plan(genome)
    plan.check(linears)
    assert plan.bits == "w4a8"
    assert space.genome(plan) == genome


def test_a_uniform_plan_lies_in_the_space_however_it_is_written(
    space: SearchSpace, linears: list[LinearSpec]
) -> None:
    plan = uniform_plan("w4a8", LayerScheme(weight_group=192, activation_group=192), linears)
    assert space.genome(plan) == space.uniform(192)
    assert space.plan(space.uniform(192))[Q].weight_group == "channel"


def test_uniform_takes_the_nearest_choice(space: SearchSpace) -> None:
    # 96 is nearer to 128 than 192 by a ratio: 1.33 against 1.5
    assert space.plan(space.uniform(128))[Q].weight_group == 96
    assert space.plan(space.uniform(128))[DOWN].weight_group == 128


def test_wrong_genomes_and_plans_are_refused(space: SearchSpace) -> None:
    with pytest.raises(InputError, match=r"one gene a linear \(14\), got 2"):
        space.plan((0, 0))
    with pytest.raises(InputError, match=r"gene of .* must be in 0 … 3, got 4"):
        space.plan((4,) + (0,) * 13)
    with pytest.raises(InputError, match=r"gene of .* must be in 0 … 3, got -1"):
        space.plan((-1,) + (0,) * 13)
    plan = space.plan((0,) * 14)
    other = QuantizationPlan("w4a8", dict(plan.layers) | {Q: LayerScheme(weight_bits=8)})
    with pytest.raises(InputError, match=f"got w8 g128 .* for {Q}"):
        space.genome(other)


def test_digest_follows_what_a_genome_means(space: SearchSpace, linears: list[LinearSpec]) -> None:
    assert search_space(linears, SCHEME, "w4a8").digest == space.digest
    others = [
        search_space(linears, SCHEME, "w4a8", tied=True),
        search_space(linears, SCHEME, "custom"),
        search_space(linears[:7], SCHEME, "w4a8"),
    ]
    assert len({space.digest, *(other.digest for other in others)}) == 4


def test_a_space_travels_to_workers(space: SearchSpace) -> None:
    copy = deepcopy(space)
    assert copy == space
    assert copy.digest == space.digest
