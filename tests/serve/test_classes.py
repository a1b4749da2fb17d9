"""From prompts to class labels, rule by rule."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qdit.serve.classes import label_of
from qdit.serve.errors import BadRequestError

from .conftest import CARD

NAMELESS = replace(CARD, class_names=())


@pytest.mark.parametrize(
    ("prompt", "label"),
    [
        ("0", 0),
        ("4", 4),
        ("cat", 1),
        ("  CAT ", 1),
        ("tench, tinca tinca", 4),
        ("Tinca_Tinca", 4),
        ("tinca-tinca", 4),
        ("crane, machine", 3),
    ],
)
def test_names_and_ids(prompt: str, label: int) -> None:
    assert label_of(prompt, CARD) == label


def test_a_whole_name_wins_over_a_synonym() -> None:
    card = replace(CARD, class_names=("boat, ship", "ship", "a", "b", "c"))
    assert label_of("ship", card) == 1
    assert label_of("boat", card) == 0


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("5", r"class ids are 0 … 4, got 5"),
        ("-1", r"a class's name or id 0 … 4, got '-1'"),
        ("1.0", r"got '1\.0'"),
        ("١", r"got '١'"),  # digits of other scripts are no ids
        ("caat", r"try cat"),
        ("crane", r"names several classes; give an id: 2 \(crane, bird\) or 3 \(crane, machine\)"),
        ("", r"got ''"),
        ("  ", r"got ''"),
        (",", r"got ','"),
        ("x" * 500, r"got 'x{59}…'"),
    ],
)
def test_refusals(prompt: str, message: str) -> None:
    with pytest.raises(BadRequestError, match=message) as refused:
        label_of(prompt, CARD)
    assert refused.value.param == "prompt"


def test_a_model_without_names_takes_ids() -> None:
    assert label_of("3", NAMELESS) == 3
    with pytest.raises(BadRequestError, match=r"classes have no names\), got 'cat'"):
        label_of("cat", NAMELESS)
