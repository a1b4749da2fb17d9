"""torch's threads: one for a batcher's small operations, many for a network, each thread's own."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from qdit.serve.torch_threads import many_threads, use_one_thread


def in_thread(work: Callable[[], object]) -> object:
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def test_one_thread_is_the_calling_threads_own() -> None:
    before = torch.get_num_threads()

    def alone() -> int:
        use_one_thread()
        return torch.get_num_threads()

    assert in_thread(alone) == 1
    assert torch.get_num_threads() == before


def test_a_network_has_many_and_leaves_one() -> None:
    def run() -> tuple[int, int, int]:
        with many_threads(3):
            within = torch.get_num_threads()
        after = torch.get_num_threads()
        with pytest.raises(RuntimeError), many_threads(2):
            raise RuntimeError("out of memory")
        return within, after, torch.get_num_threads()

    assert in_thread(run) == (3, 1, 1)
