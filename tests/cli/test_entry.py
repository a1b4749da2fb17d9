"""How a command ends, and what it imports to begin."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Annotated

import pytest
import typer

from qdit import cli
from qdit.cli.entry import GATE_FAILED, console_entry
from qdit.errors import InputError, QditError

LOADED = "import json, sys\nfrom qdit.cli import {}_command\nprint(json.dumps([*sys.modules]))"
COMMANDS = ["bench", "export", "inspect", "serve", "tune", "validate"]


def end_of(command: object, *arguments: str) -> int | str | None:
    """The exit code of a console entry for `command`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["qdit-odd", *arguments])
        with pytest.raises(SystemExit) as stopped:
            console_entry(command)()  # type: ignore[arg-type]
    return stopped.value.code


def raising(error: BaseException) -> object:
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize("code", [0, 1, GATE_FAILED])
def test_the_code_of_a_command_is_the_exit_code(code: int) -> None:
    assert end_of(lambda: code) == code


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("too [odd]"), 2, "error: too [odd]"),
        (QditError("broken"), 1, "error: broken"),
        (KeyboardInterrupt(), 130, "error: interrupted; run the same command again to go on"),
        (typer.Abort(), 130, ""),
    ],
    ids=["input", "failure", "interrupted", "aborted"],
)
def test_an_error_is_one_line_and_an_exit_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end_of(raising(error)) == code
    assert capsys.readouterr().err.strip() == line


def test_a_flag_of_the_wrong_type_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    def command(number: Annotated[int, typer.Option()] = 1) -> int:
        return number

    assert end_of(command, "--number", "7") == 7
    assert end_of(command, "--number", "x") == 2
    assert capsys.readouterr().err.startswith("error: Invalid value for '--number'")


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["qdit-odd"])
    with pytest.raises(ZeroDivisionError):
        console_entry(raising(ZeroDivisionError()))()  # type: ignore[arg-type]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_starts_without_the_others_and_without_heavy_libraries(command: str) -> None:
    script = LOADED.format(command)
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    loaded = set(json.loads(done.stdout))
    assert {name for name in COMMANDS if f"qdit.cli.{name}" in loaded} == {command}
    assert not {"numpy", "torch", "diffusers", "onnx", "onnxruntime", "fastapi"} & loaded


@pytest.mark.parametrize("name", ["odd_command", "entry_command", "_COMMAND", "bench_odd"])
def test_what_is_no_command_is_no_attribute(name: str) -> None:
    with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
        getattr(cli, name)
