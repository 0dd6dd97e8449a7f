"""Who drives a run: the port behind which a cluster chooses one conductor of several."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

Say = Callable[[str], object]


class Leadership(Protocol):
    """The choice of one conductor."""

    def held(self, on_wait: Say, on_outage: Say) -> AbstractAsyncContextManager[None]:
        """Waits until this process is the chosen one, and stays it as long as the block runs.

        Args:
            on_wait: Takes the reason at each try that fails.
            on_outage: Takes the reason why the choice cannot be renewed, and the empty text when it is.

        Raises:
            FailedPrecondition: Another process has been chosen; the block was cancelled.
        """

    async def above(self, seen: int) -> int:
        """The term of this process, the number under which it was chosen; 0 where nobody chooses.

        Args:
            seen: The highest term that anybody knows of. A choice whose counter was lost is raised above it.

        Raises:
            FailedPrecondition: Another process has been chosen.
            Unavailable: It cannot be found out now.
        """

    def doubt(self) -> None:
        """Says that somebody has seen another one act: the choice is looked at again at once."""


class Unopposed:
    """Nobody chooses: the run's lease in Redis alone decides."""

    @asynccontextmanager
    async def held(self, on_wait: Say, on_outage: Say) -> AsyncIterator[None]:
        """See `Leadership`."""
        yield

    async def above(self, seen: int) -> int:
        """See `Leadership`."""
        return 0

    def doubt(self) -> None:
        """See `Leadership`."""
