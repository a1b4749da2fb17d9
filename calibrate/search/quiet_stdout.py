"""Keep a C library's stray lines off standard output."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """Discard what C code writes to file descriptor 1 meanwhile; Python's own output is kept.

    HiGHS prints a line of debugging from inside its search, whatever its log level
    (github jump-dev/HiGHS.jl, issue 312). Process-wide: use it around one such call, nothing more.
    Where there is no standard output, or no C library to flush, nothing is changed.
    """
    try:
        kept = os.dup(1)
    except OSError:
        yield
        return
    try:
        with suppress(AttributeError, OSError, ValueError):  # None, closed, or a stand-in
            sys.stdout.flush()
        flushed = _flush_c_streams()
        if flushed:
            with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - a device, not a path of ours
                os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        _flush_c_streams()
        os.dup2(kept, 1)
        os.close(kept)


def _flush_c_streams() -> bool:
    """Whether the C library's buffers could be flushed: else they would come out later."""
    try:
        return ctypes.CDLL(None).fflush(None) == 0
    except (AttributeError, OSError, TypeError):  # Windows names its C library otherwise
        return False
