"""What C code prints is gone, what Python prints is not."""

from __future__ import annotations

import ctypes

import pytest

from qdit.calibrate.search.quiet_stdout import quiet_stdout


def test_c_output_is_discarded_and_pythons_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    library = ctypes.CDLL(None)
    print("before")  # noqa: T201 - the subject
    with quiet_stdout():
        library.puts(b"stray")
    print("after")  # noqa: T201
    library.puts(b"later")
    library.fflush(None)
    assert capfd.readouterr().out.split() == ["before", "after", "later"]


def test_an_error_inside_leaves_the_output_open(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), quiet_stdout():
        raise KeyError
    print("after", flush=True)  # noqa: T201
    assert capfd.readouterr().out == "after\n"
