"""Whether this machine has what our own products are written for."""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache
from pathlib import Path

from ...errors import StepError

_NAMES = {1: "AVX512-VNNI", 2: "AMX"}
_FEATURE = "avx512_vnni"


def machine_obstacle() -> str:
    """Why they cannot run here, '' where they can: asked before anything is compiled."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        here = f"{platform.machine()} {platform.system()}"
        return f"they are written for x86-64 Linux, this is {here}"
    if _FEATURE not in processor_flags():
        return "this processor has no AVX512-VNNI"
    return ""


@cache
def processor_flags() -> frozenset[str]:
    """The instruction sets that Linux names of the first processor; none where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


@cache
def library_units(library: Path) -> str:
    """What the library's products run on here: 'AVX512-VNNI' or 'AMX', '' for nothing.

    Raises `StepError` for a library that cannot be loaded.
    """
    try:
        units = ctypes.CDLL(str(library)).qdit_available_units()
    except (OSError, AttributeError) as error:
        raise StepError(
            f"{library} is no library of products: {error}; delete it, and it is made again"
        ) from error
    return _NAMES.get(int(units), "")
