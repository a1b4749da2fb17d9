"""The order of the floors: the rule holds, and it would notice each way of breaking it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

LINT_IMPORTS = Path(sys.executable).parent / "lint-imports"
FLOORS = ["cli", "serve", "engines", "export", "calibrate", "files", "errors"]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(LINT_IMPORTS), "--no-logo", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path: Path, copy_source: Callable[[Path], Path]) -> Path:
    """A folder with a copy of the package in it, to be broken at will."""
    source = copy_source(tmp_path / "qdit")
    (source / "pyproject.toml").rename(tmp_path / "pyproject.toml")
    return tmp_path


def append(module: Path, line: str) -> None:
    module.write_text(module.read_text("utf-8") + f"\n{line}\n", "utf-8")


def module_file(checkout: Path, name: str) -> Path:
    file = checkout / "qdit" / f"{name}.py"
    return file if file.exists() else checkout / "qdit" / name / "__init__.py"


def test_the_floors_import_downwards_only(repository: Path) -> None:
    done = lint(repository)
    assert done.returncode == 0, done.stdout


def test_an_untouched_copy_passes(checkout: Path) -> None:
    done = lint(checkout)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("above", "below"), pairwise(FLOORS), ids=lambda name: name)
def test_an_import_of_the_floor_above_is_caught(checkout: Path, above: str, below: str) -> None:
    file = module_file(checkout, below)
    dots = ".." if file.name == "__init__.py" else "."
    append(file, f"from {dots} import {above}")
    done = lint(checkout)
    assert done.returncode == 1
    assert f"qdit.{below} is not allowed to import qdit.{above}" in done.stdout


def test_an_import_hidden_in_a_function_is_caught(checkout: Path) -> None:
    append(
        checkout / "qdit" / "calibrate" / "plan.py",
        "def late() -> None:\n    from ..export import capabilities",
    )
    (checkout / "qdit" / "export" / "capabilities.py").touch()
    done = lint(checkout)
    assert done.returncode == 1
    assert "qdit.calibrate.plan -> qdit.export.capabilities" in done.stdout


def test_a_new_module_at_the_root_must_be_given_a_floor(checkout: Path) -> None:
    (checkout / "qdit" / "helpers.py").write_text('"""New."""\n', "utf-8")
    done = lint(checkout)
    assert done.returncode == 1
    assert "helpers" in done.stdout
