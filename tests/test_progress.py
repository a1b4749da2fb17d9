"""Progress: silent or drawn, it passes every item on and prints messages as they are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qdit.progress import Progress, Silent, Terminal


@pytest.mark.parametrize("verbosity", [None, 0, 1, 2], ids=["silent", "-q", "default", "-v"])
def test_tracking_passes_all_items_on_lazily(verbosity: int | None) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(3):
            taken.append(item)
            yield item

    progress: Progress = Silent() if verbosity is None else Terminal(verbosity)
    stream = progress.track(items(), "counting", total=3)
    assert next(iter(stream)) == 0
    assert taken == [0]
    assert list(stream) == [1, 2]


def test_silence_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    Silent().say("a fact")
    list(Silent().track([1], "counting"))
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize(
    ("verbosity", "expected"),
    [
        (0, []),
        (1, ["counting …", "a fact"]),
        (2, ["counting …", "a fact", "a detail"]),
    ],
    ids=["-q", "default", "-v"],
)
def test_facts_go_to_stderr_as_plain_lines_where_there_is_no_terminal(
    verbosity: int, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with Terminal(verbosity) as terminal:
        assert list(terminal.track([1, 2], "counting")) == [1, 2]
        terminal.say("a fact")
        terminal.detail("a detail")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == expected


def test_brackets_and_long_lines_are_printed_as_they_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    message = "wrote [bold]/[/tmp/x] of shape [n, k] " + "long/" * 40
    with Terminal(2) as terminal:
        terminal.say(message)
        terminal.detail(message)
        list(terminal.track([], "[/red] step"))
    assert capsys.readouterr().err.splitlines() == [message, message, "[/red] step …"]


def test_a_drawn_bar_survives_brackets_and_counts_to_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Terminal(1) as terminal:
        assert list(terminal.track(range(3), "[/red] step", total=3)) == [0, 1, 2]
    drawn = capsys.readouterr().err
    assert "[/red] step" in drawn
    assert "3/3" in drawn


def test_an_error_inside_stops_the_bars_and_passes() -> None:
    with pytest.raises(RuntimeError, match="inside"), Terminal(1) as terminal:
        for _ in terminal.track(range(3), "counting"):
            raise RuntimeError("inside")
