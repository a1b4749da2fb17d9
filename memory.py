"""Give freed memory back to the system, so that a long job's peak is that of its largest step."""

from __future__ import annotations

import ctypes
import gc
import sys


def release_memory() -> None:
    """Collect cycles (module graphs hold them) and, under glibc, return freed heap pages.

    Weights of a few megabytes lie on the heap, where freed ones stay resident otherwise.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:  # musl has no such function and returns memory by itself
            trim(0)
