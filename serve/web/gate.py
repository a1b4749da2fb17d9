"""Who is inside: requests that are being answered, and whether new ones may come in."""

from __future__ import annotations

import asyncio
from types import TracebackType

from ..errors import UnavailableError


class Gate:
    """Counts generation requests; once closed it lets nobody in and can wait for the last."""

    def __init__(self) -> None:
        self.is_open = True
        self.inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    def __enter__(self) -> None:
        if not self.is_open:
            raise UnavailableError("the server is shutting down; ask another one")
        self.inside += 1
        self._empty.clear()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.inside -= 1
        if self.inside == 0:
            self._empty.set()

    async def drain(self, seconds: float) -> bool:
        """Close, and wait until everybody is out; False: some are still inside after `seconds`."""
        self.is_open = False
        try:
            await asyncio.wait_for(self._empty.wait(), seconds)
        except asyncio.TimeoutError:
            return False
        return True
