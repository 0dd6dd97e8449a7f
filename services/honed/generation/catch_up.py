"""Keeps a generator at the version that the others serve, whatever pushes it missed.

Nothing that it meets on the way ends serving: a store, a disk or an engine that fails is tried again, after growing pauses.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final

from honed.artifacts.version import VersionId
from honed.generation.backoff import Backoff
from honed.generation.control import GenerationControlService
from honed.kit.errors import Aborted, DataLoss, FailedPrecondition, HonedError, NotFound
from honed.queue.progress import ProgressBoard

logger = logging.getLogger(__name__)

HEARTBEAT_S: Final = 2.0
_READ_TIMEOUT_S: Final = 5.0
_PAUSES_S: Final = (HEARTBEAT_S, 60.0)
"""Between tries that failed; a try whose commit is undone stops requests for a while."""
_REFUSED = (Aborted, DataLoss, FailedPrecondition, NotFound)
"""Errors of a version that this process cannot serve, however often it tries."""


class CatchUp:
    """Compares the version that this process serves with the one that the others serve."""

    def __init__(
        self,
        control: GenerationControlService,
        board: ProgressBoard,
        allowed: asyncio.Event,
        *,
        patience_s: float = HEARTBEAT_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Compares nothing yet.

        Args:
            control: Changes the version.
            board: Where the learner says which version was committed last.
            allowed: Cleared while this process is behind: what it would sample for training would
                be stale.
            patience_s: How long it may be behind before it fetches the version by itself: a push
                may be under way.
            clock: Seconds, monotonic.
            sleep: Pauses for seconds.
        """
        self._control = control
        self._board = board
        self._allowed = allowed
        self._patience_s = patience_s
        self._clock = clock
        self._sleep = sleep
        self._behind_since: float | None = None
        self._backoff = Backoff(*_PAUSES_S, clock)
        self.refused: dict[VersionId, str] = {}
        """Versions that this process could not serve, each with the reason."""

    async def join(self) -> None:
        """Brings a newcomer to the version that is served."""
        while not await self.compare(patience_s=0.0):
            await self._sleep(HEARTBEAT_S)

    async def run(self) -> None:
        """Compares for ever."""
        while True:
            await self._sleep(HEARTBEAT_S)
            await self.compare()

    async def compare(self, patience_s: float | None = None) -> bool:
        """Compares once, and catches up if this process is behind; True if it no longer is.

        A learner or a Redis that says nothing is no reason to be behind.
        """
        served = await self.served()
        if served is None or served <= self._control.version or served in self.refused:
            return self._level()
        now = self._clock()
        self._behind_since = now if self._behind_since is None else self._behind_since
        if now - self._behind_since < (self._patience_s if patience_s is None else patience_s):
            return False
        self._allowed.clear()
        if self._control.changing or self._backoff.left_s:
            return False
        logger.info("behind; fetching the version by itself", extra={"version": served.label})
        try:
            await self._control.change(served, "")
        except _REFUSED as error:
            self.refused[served] = str(error)
            logger.warning(
                "cannot serve the version that the others serve", extra={"version": served.label, "reason": str(error)}
            )
        except Exception as error:
            logger.warning(
                "not caught up; trying again",
                extra={"version": served.label, "reason": str(error), "pause_s": self._backoff.failed()},
                exc_info=not isinstance(error, HonedError | OSError),
            )
            return False
        return self._level()

    async def served(self) -> VersionId | None:
        """What generators have committed last; None where nobody says so."""
        try:
            async with asyncio.timeout(_READ_TIMEOUT_S):
                progress = await self._board.read()
            return VersionId.parse(progress.version) if progress is not None and progress.version else None
        except Exception as error:
            logger.info("the learner's progress cannot be read", extra={"reason": str(error) or type(error).__name__})
            return None

    def _level(self) -> bool:
        self._behind_since = None
        self._backoff.succeeded()
        self._allowed.set()
        return True
