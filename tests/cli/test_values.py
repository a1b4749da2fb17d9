"""What was given on the command line, as values."""

from __future__ import annotations

import re

import pytest

from qdit.cli.values import batch_sizes, parsed, terminal_of
from qdit.errors import InputError


@pytest.mark.parametrize(("text", "sizes"), [("1", (1,)), ("1,8", (1, 8)), ("16, 4", (16, 4))])
def test_batch_sizes_are_numbers_in_the_order_given(text: str, sizes: tuple[int, ...]) -> None:
    assert batch_sizes(text) == sizes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "batch must be numbers such as 1,8, got ''"),
        ("1,x", "batch must be numbers such as 1,8, got '1,x'"),
        ("1.5", "batch must be numbers such as 1,8, got '1.5'"),
        ("8,0", "every batch size must be at least 1, got '8,0'"),
    ],
)
def test_other_batch_sizes_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        batch_sizes(text)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("group_size", "64", 64),
        ("group_size", "channel", "channel"),
        ("fid_samples", "auto", None),
        ("device", "auto", "auto"),
        ("symmetric", True, True),
    ],
)
def test_a_flag_that_takes_a_number_or_a_word(name: str, value: object, expected: object) -> None:
    assert parsed(name, value) == expected


@pytest.mark.parametrize(
    ("verbose", "quiet", "verbosity"),
    [(False, False, 1), (True, False, 2), (False, True, 0), (True, True, 0)],
)
def test_quiet_wins_over_verbose(verbose: bool, quiet: bool, verbosity: int) -> None:
    assert terminal_of(verbose, quiet).verbosity == verbosity
