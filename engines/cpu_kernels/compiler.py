"""The C compiler that this machine has."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import InputError, StepError

VARIABLE = "CC"
_ON_PATH = ("cc", "gcc", "clang")
_TIMEOUT = 300.0
_LOG_LINES = 12


@dataclass(frozen=True)
class Compiler:
    """A command that takes gcc's options, and the ones that only this compiler needs."""

    command: tuple[str, ...]
    options: tuple[str, ...] = ()

    def version(self) -> str:
        """What it says of itself. Raises `StepError` where it does not run."""
        return self._run(["--version"], {})

    def compile(self, arguments: Sequence[str], scratch: Path) -> None:
        """Run it; what it caches goes into the folder `scratch`.

        Raises `StepError` with the end of its log where it fails.
        """
        caches = {"ZIG_LOCAL_CACHE_DIR": str(scratch), "ZIG_GLOBAL_CACHE_DIR": str(scratch)}
        self._run([*self.options, *arguments], caches)

    def _run(self, arguments: Sequence[str], variables: Mapping[str, str]) -> str:
        line = [*self.command, *arguments]
        try:
            done = subprocess.run(
                line,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_TIMEOUT,
                env=os.environ | dict(variables),
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise StepError(f"the C compiler {shlex.join(self.command)}: {error}") from error
        if done.returncode != 0:
            log = "\n".join((done.stderr or done.stdout).strip().splitlines()[-_LOG_LINES:])
            raise StepError(
                f"the C compiler {shlex.join(self.command)} failed with status "
                f"{done.returncode}: {log or 'it wrote nothing'}"
            )
        return done.stdout


def find_compiler() -> Compiler | None:
    """The first of these that there is; None where there is none.

    1. `$CC`, a command that may have arguments. It must exist: `InputError` otherwise.
    2. `cc`, `gcc` or `clang` on the PATH.
    3. The package `ziglang`, `pip install 'qdit[cpu]'`: a compiler in a wheel.
    """
    given = os.environ.get(VARIABLE, "").strip()
    if given:
        return _given(given)
    for name in _ON_PATH:
        if found := shutil.which(name):
            return Compiler((found,))
    if importlib.util.find_spec("ziglang") is not None:
        # It would otherwise compile for the very processor that it runs on, and trap on overflow.
        options = ("-mcpu=baseline", "-fno-sanitize=undefined")
        return Compiler((sys.executable, "-m", "ziglang", "cc"), options)
    return None


def _given(line: str) -> Compiler:
    command, *arguments = shlex.split(line)
    found = shutil.which(command)
    if found is None:
        raise InputError(
            f"${VARIABLE} must name a C compiler that exists, got {line!r}; correct or unset it"
        )
    return Compiler((found, *arguments))
