"""Threads of torch's operations on the CPU: one for the small ones, all for whole networks.

A few hundred thousand numbers are enough for torch to spread an operation over all cores, where the
threads then spin and wait for the next one: stepping a batch took 8 times the CPU time, and longer
on the clock where other work has the cores. The setting is each thread's own (OpenMP's).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# as the machine or OMP_NUM_THREADS has it, before a worker sets its own
_ALL = torch.get_num_threads()


def use_one_thread() -> None:
    """From here on, for what the calling thread does."""
    torch.set_num_threads(1)


@contextmanager
def many_threads(count: int | None = None) -> Iterator[None]:
    """`count` threads (None: as many as torch chose) for a network within; then one again."""
    torch.set_num_threads(count or _ALL)
    try:
        yield
    finally:
        use_one_thread()
