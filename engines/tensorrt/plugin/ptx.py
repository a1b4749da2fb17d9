"""PTX as an engine embeds it: of a version that the driver takes, with the parameters expected."""

from __future__ import annotations

import re

from ....errors import StepError

Isa = tuple[int, int]

# CUDA driver version → newest PTX ISA version that it compiles (PTX ISA, 'Release Notes').
_ISA_OF_CUDA: tuple[tuple[int, Isa], ...] = (
    (13020, (9, 2)),
    (13010, (9, 1)),
    (13000, (9, 0)),
    (12090, (8, 8)),
    (12080, (8, 7)),
    (12070, (8, 6)),
    (12050, (8, 5)),
    (12040, (8, 4)),
    (12030, (8, 3)),
    (12020, (8, 2)),
    (12010, (8, 1)),
    (12000, (8, 0)),
)
_OLDEST_ISA: Isa = (8, 0)  # the kernels' instructions: warpgroup products and bulk copies
_VERSION = re.compile(rb"^(\.version[ \t]+)(\d+)\.(\d+)", re.MULTILINE)
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)")


def newest_isa(cuda: int) -> Isa:
    """The newest PTX that a driver of this CUDA version takes (`cuDriverGetVersion`: 12080).

    Raises `StepError` for drivers before CUDA 12.0.
    """
    for since, isa in _ISA_OF_CUDA:
        if cuda >= since:
            return isa
    raise StepError(
        f"the plugins' kernels need a driver of CUDA 12.0 or newer, got {cuda // 1000}."
        f"{cuda % 1000 // 10}; update the driver"
    )


def capped(ptx: bytes, most: Isa) -> bytes:
    """PTX that declares `most` where it declared a newer version, without a final NUL.

    NVRTC writes its own newest version, whatever the program uses; the kernels use nothing after
    8.0, so the declaration alone keeps an older driver from compiling them.
    """
    text = ptx.rstrip(b"\0")
    found = _VERSION.search(text)
    if found is None:
        raise StepError("the compiled kernel is no PTX: it has no .version; compile it anew")
    declared = int(found[2]), int(found[3])
    wanted = max(_OLDEST_ISA, min(declared, most))
    line = b"%s%d.%d" % (found[1], *wanted)
    return text[: found.start()] + line + text[found.end() :]


def entry_parameters(ptx: bytes, name: str) -> list[str]:
    """The types of an entry's parameters, 'u64' (pointers), 'u32', 'f32', in their order.

    Raises `StepError` where there is no such entry.
    """
    found = re.search(rf"\.entry\s+{re.escape(name)}\s*\((.*?)\)", ptx.decode(), re.DOTALL)
    if found is None:
        raise StepError(f"the compiled kernel has no entry {name}")
    return _PARAMETER.findall(found[1])
