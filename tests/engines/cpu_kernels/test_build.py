"""The operator's library: which compiler makes it, when, and what is said where none can."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from qdit.engines.cpu_kernels import build
from qdit.engines.cpu_kernels.build import build_library, source_files
from qdit.engines.cpu_kernels.compiler import Compiler, find_compiler
from qdit.errors import InputError, StepError
from qdit.files import CACHE_VARIABLE

from .conftest import random_linear, random_rows, run_linear

# A compiler that notes each call, says `version`, and writes what it was called with.
_FAKE = """#!{python}
import sys
from pathlib import Path
with Path({log!r}).open("a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
if "--version" in sys.argv:
    print({version!r})
elif {fails!r}:
    print("a line of stdout")
    sys.exit("\\n".join(f"error {{i}}" for i in range(30)))
else:
    Path(sys.argv[sys.argv.index("-o") + 1]).write_text(" ".join(sys.argv[1:]))
"""


class Fake:
    """A compiler's place and the calls that it got."""

    def __init__(self, folder: Path, name: str, version: str = "fake 1", fails: bool = False):
        folder.mkdir(exist_ok=True)
        self.path, self.log = folder / name, folder / f"{name}.log"
        text = _FAKE.format(python=sys.executable, log=str(self.log), version=version, fails=fails)
        self.path.write_text(text)
        self.path.chmod(0o755)

    def compilations(self) -> list[list[str]]:
        """The arguments of each call that compiled."""
        if not self.log.exists():
            return []
        calls = [line.split() for line in self.log.read_text().splitlines()]
        return [call for call in calls if "--version" not in call]


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler, and nothing in the cache."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CC", raising=False)
    _without_ziglang(monkeypatch)


def _without_ziglang(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> object:
        return None if name == "ziglang" else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)


def _with_ziglang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: name == "ziglang")


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").rglob("*"))


class TestChoice:
    def test_the_variable_comes_first_and_may_have_arguments(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Fake(tmp_path / "bin", "cc")
        mine = Fake(tmp_path / "mine", "my-cc")
        monkeypatch.setenv("CC", f"{mine.path} --sysroot=/x")
        assert find_compiler() == Compiler((str(mine.path), "--sysroot=/x"))
        build_library("plain")
        assert mine.compilations()[0][0] == "--sysroot=/x"

    def test_a_variable_that_names_nothing_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Fake(tmp_path / "bin", "cc")
        monkeypatch.setenv("CC", "no-such-cc -O1")
        with pytest.raises(InputError, match=r"\$CC must name a C compiler that exists, got 'no-s"):
            find_compiler()

    def test_cc_gcc_and_clang_in_this_order(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _with_ziglang(monkeypatch)
        for name in ("clang", "gcc", "cc"):
            fake = Fake(tmp_path / "bin", name)
            assert find_compiler() == Compiler((str(fake.path),))

    def test_then_the_wheels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """For any processor of the kind: zig would compile for the very one that it runs on."""
        _with_ziglang(monkeypatch)
        found = find_compiler()
        assert found is not None
        assert found.command == (sys.executable, "-m", "ziglang", "cc")
        assert "-mcpu=baseline" in found.options

    def test_none_is_said_with_what_to_install(self) -> None:
        assert find_compiler() is None
        with pytest.raises(InputError, match=r"no C compiler; install one, or qdit\[cpu\]"):
            build_library("plain")


class TestCache:
    def test_it_is_compiled_once(self, tmp_path: Path) -> None:
        fake = Fake(tmp_path / "bin", "cc")
        path = build_library("plain")
        assert build_library("plain") == path
        (call,) = fake.compilations()
        names = [Path(argument).name for argument in call if argument.endswith(".c")]
        assert names == ["custom_op.c", "node.c", "plain.c"]
        assert {"-O3", "-ffp-contract=off"} <= set(call)
        assert not any("march" in argument or "fast-math" in argument for argument in call)
        assert cached(tmp_path) == ["cpu_kernels", path.name]

    def test_again_by_another_version_of_the_compiler(self, tmp_path: Path) -> None:
        first = build_library("plain") if Fake(tmp_path / "bin", "cc") else None
        Fake(tmp_path / "bin", "cc", version="fake 2")
        assert build_library("plain") != first

    def test_again_from_other_sources(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Fake(tmp_path / "bin", "cc")
        first = build_library("plain")
        changed = tmp_path / "c"
        changed.mkdir()
        for path in build.SOURCES.iterdir():
            (changed / path.name).write_bytes(path.read_bytes())
        monkeypatch.setattr(build, "SOURCES", changed)
        second = build_library("plain")
        header = changed / "product.h"
        header.write_text(header.read_text() + "/* more */\n")
        third = build_library("plain")
        # the places of the sources are no part of it, their contents are
        assert second == first
        assert third != first

    def test_a_kept_one_needs_no_compiler(self, tmp_path: Path) -> None:
        fake = Fake(tmp_path / "bin", "cc")
        path = build_library("plain")
        fake.path.unlink()
        assert build_library("plain") == path
        with pytest.raises(InputError, match="no C compiler"):
            build_library("fast")

    def test_a_failure_leaves_nothing_and_says_the_end_of_the_log(self, tmp_path: Path) -> None:
        Fake(tmp_path / "bin", "cc", fails=True)
        with pytest.raises(StepError, match=r"cc failed with status 1: error 18\n(.*\n)+error 29$"):
            build_library("plain")
        assert cached(tmp_path) == ["cpu_kernels"]

    def test_a_compiler_that_does_not_start(self, tmp_path: Path) -> None:
        fake = Fake(tmp_path / "bin", "cc")
        fake.path.write_text("#!/no/such/interpreter\n")
        with pytest.raises(StepError, match=r"the C compiler .*cc: "):
            build_library("plain")


def test_every_source_belongs_to_one_kind_of_products() -> None:
    plain, fast = ({path.name for path in source_files(kind)} for kind in ("plain", "fast"))
    assert plain == {"custom_op.c", "node.c", "plain.c"}
    assert "plain.c" not in fast
    assert plain | fast == {path.name for path in build.SOURCES.glob("*.c")}


class TestRealCompilers:
    @pytest.mark.parametrize("name", ["gcc", "clang"])
    def test_that_are_on_the_path(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.undo()
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
        import shutil

        if shutil.which(name) is None:
            pytest.skip(f"this machine has no {name}")
        monkeypatch.setenv("CC", f"{name} -Wall -Wextra -Wpedantic -Werror")
        self._check()

    def test_the_wheels(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        pytest.importorskip("ziglang", reason="the package ziglang is not installed: qdit[cpu]")
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        monkeypatch.delenv("CC", raising=False)
        self._check()
        (library,) = (tmp_path / "cache" / "cpu_kernels").iterdir()
        assert library.suffix == ".so"

    def _check(self) -> None:
        linear = random_linear(64, 5, 32, 4, zero_points=True, bias=True)
        x = random_rows(3, 64)
        made = run_linear(linear, x, build_library("plain"))
        np.testing.assert_allclose(made, linear.terms(x).sum(axis=2), rtol=1e-4, atol=1e-6)
