"""Repeats calls of an API server that does not serve for the moment: with growing pauses, and as late as it asks."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from honed.conductor.cluster.api import ApiUnavailable

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0


class Patience:
    """Waits for as long as it takes. After `late_s` without an answer the reason is an alarm, until one comes."""

    def __init__(
        self,
        alarm: Callable[[str], None],
        late_s: float,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        """Waits for nothing yet.

        Args:
            alarm: Takes the reason, and the empty text when all is well.
            late_s: Seconds.
            clock: Gives seconds.
            rng: Spreads the pauses, so that many clients do not come back at once.
        """
        self._alarm, self._late_s, self._clock, self._rng = alarm, late_s, clock, rng or random.Random()
        self._since: float | None = None
        self._pause_s = 0.0
        self._last = clock()

    def answered(self) -> None:
        """Says that the API serves."""
        if self._since is not None:
            self._since = None
            self._alarm("")

    async def failed(self, error: ApiUnavailable) -> None:
        """Pauses after a failure. Pauses grow from one failure to the next, until there was none for a while."""
        now = self._clock()
        if self._since is None:
            self._since = now
        if now - self._since >= self._late_s:
            self._alarm(str(error))
        quiet = now - self._last > 2 * LONGEST_PAUSE_S
        self._pause_s = FIRST_PAUSE_S if quiet or not self._pause_s else min(2 * self._pause_s, LONGEST_PAUSE_S)
        pause_s = self._pause_s * self._rng.uniform(0.5, 1.0)
        if error.retry_after_s is not None:
            pause_s = max(pause_s, error.retry_after_s)
        logger.info("the cluster is asked again", extra={"reason": str(error), "pause_s": round(pause_s, 3)})
        await asyncio.sleep(pause_s)
        self._last = self._clock()

    async def until(self, call: Callable[[], Awaitable[Result]]) -> Result:
        """The answer of a call, repeated until it comes."""
        while True:
            try:
                answer = await call()
            except ApiUnavailable as error:
                await self.failed(error)
            else:
                self.answered()
                return answer
