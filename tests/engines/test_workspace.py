"""The resumable steps: each rule of `Workspace`'s docstring, by number."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdit.engines.workspace import Workspace


def test_rule_1_a_finished_step_is_not_run_again(tmp_path: Path) -> None:
    calls: list[Path] = []
    first = Workspace(tmp_path)
    folder = first.run("step", {"seed": 0}, calls.append)
    again = Workspace(tmp_path)
    assert again.run("step", {"seed": 0}, calls.append) == folder
    assert calls == [folder]
    assert again.reused == ["step"]
    assert again.timings["step"] == first.timings["step"]


def test_rule_2_a_killed_step_goes_on_from_its_files(tmp_path: Path) -> None:
    def killed(folder: Path) -> None:
        (folder / "part").write_text("kept")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Workspace(tmp_path).run("step", {"seed": 0}, killed)

    seen: list[str] = []
    workspace = Workspace(tmp_path)
    workspace.run("step", {"seed": 0}, lambda folder: seen.append((folder / "part").read_text()))
    assert seen == ["kept"]
    assert workspace.reused == []


def test_rule_3_other_inputs_start_from_an_empty_folder(tmp_path: Path) -> None:
    Workspace(tmp_path).run("step", {"seed": 0}, lambda folder: (folder / "part").touch() or None)
    files: list[list[str]] = []
    Workspace(tmp_path).run(
        "step", {"seed": 1}, lambda folder: files.append([p.name for p in folder.iterdir()])
    )
    assert files == [["done.json"]]


def test_rule_4_no_resume_starts_over(tmp_path: Path) -> None:
    calls: list[Path] = []
    Workspace(tmp_path).run("step", {}, calls.append)
    Workspace(tmp_path, resume=False).run("step", {}, calls.append)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"key": 1}'], ids=["empty", "cut", "list", "short"]
)
def test_a_damaged_marker_counts_as_not_finished(tmp_path: Path, text: str) -> None:
    calls: list[Path] = []
    folder = Workspace(tmp_path).run("step", {}, calls.append)
    (folder / "done.json").write_text(text)
    Workspace(tmp_path).run("step", {}, calls.append)
    assert len(calls) == 2


def test_forget_makes_one_step_run_again(tmp_path: Path) -> None:
    calls: list[str] = []
    workspace = Workspace(tmp_path)
    for step in ("one", "two"):
        workspace.run(step, {}, lambda folder: calls.append(folder.name))
    workspace.forget("one")
    for step in ("one", "two"):
        workspace.run(step, {}, lambda folder: calls.append(folder.name))
    assert calls == ["one", "two", "one"]
