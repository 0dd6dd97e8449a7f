"""How many requests an engine has taken, and the door that is shut while weights change."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from honed.kit.errors import Overloaded, Unavailable


class Admission:
    """Requests beyond the limit are refused at once; those within it wait while the door is shut."""

    def __init__(self, limit: int) -> None:
        """`limit` counts requests in flight, waiting ones included. The door is shut at first."""
        self._limit = limit
        self._inside = 0
        self._waiting = 0
        self._open = asyncio.Event()
        self._over: str | None = None

    @property
    def in_flight(self) -> int:
        """Requests that were taken and have not ended."""
        return self._inside

    @property
    def running(self) -> int:
        """Those of them that have passed the door."""
        return self._inside - self._waiting

    def open(self) -> None:
        """Lets requests pass."""
        self._open.set()

    def shut(self) -> None:
        """Lets requests wait."""
        self._open.clear()

    def end(self, reason: str) -> None:
        """Refuses every request from now on, those that wait too."""
        self._over = self._over or reason
        self._open.set()

    @asynccontextmanager
    async def enter(self) -> AsyncIterator[None]:
        """Takes a request, for as long as the block runs.

        Raises:
            Overloaded: If the limit is reached.
            Unavailable: If `end` was called.
        """
        if self._inside >= self._limit:
            raise Overloaded(f"{self._inside} requests are in flight, the limit; try again later")
        self._inside += 1
        try:
            while not self._open.is_set():
                self._waiting += 1
                try:
                    await self._open.wait()
                finally:
                    self._waiting -= 1
            if self._over is not None:
                raise Unavailable(self._over)
            yield
        finally:
            self._inside -= 1
