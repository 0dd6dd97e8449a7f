"""What the learner does again and again until there is room, and what it waits for: neither goes on once it is to stop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from honed.kit import tracing
from honed.kit.aio import raise_if_cancelled
from honed.kit.errors import Overloaded, Unavailable
from honed.learner.loop.checkpoint_files import is_full
from honed.learner.status import LearnerStatus
from honed.v1 import learner_pb2

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 30.0


class Stopped(Unavailable):
    """The learner is to stop, and something is half done."""


class Retry:
    """Repeats what a full disk, or a store that does not answer, has held up; meanwhile the learner shows an alarm."""

    def __init__(self, status: LearnerStatus, stopping: asyncio.Event, sleep: Callable[[float], Awaitable[None]]) -> None:
        """Does nothing yet.

        Args:
            status: Shows what fails, and what the learner waits for.
            stopping: Set once the learner is to stop.
            sleep: Between tries.
        """
        self._status, self._stopping, self.sleep = status, stopping, sleep

    async def run(self, what: str, work: Callable[[], Awaitable[object]]) -> None:
        """Does what needs a disk or a store, again and again until there is room.

        Raises:
            Stopped: The learner is to stop, and it is not done.
        """
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                with tracing.span(what):
                    await work()
            except Exception as error:
                raise_if_cancelled()
                if not is_passing(error):
                    raise
                logger.warning("trying again", extra={"what": what, "reason": str(error), "pause_s": pause_s})
                self._status.alarms[what] = f"{what} fails and is tried again: {error}"
            else:
                self._status.alarms.pop(what, None)
                return
            await self.idle(self._status.state, self.sleep(pause_s))
            if self._stopping.is_set():
                raise Stopped("the learner stops; what it could not write is done by its successor")
            pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)

    async def idle(self, state: learner_pb2.LearnerState.ValueType, work: Awaitable[object]) -> None:
        """Does something other than training, until it ends or the learner is to stop."""
        self._status.state = state
        task, stop = asyncio.ensure_future(work), asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
        finally:
            for each in (task, stop):
                each.cancel()
            await asyncio.wait({task, stop})


def is_passing(error: BaseException) -> bool:
    """Whether waiting may help: a full disk, a store that does not answer."""
    return isinstance(error, (Overloaded, Unavailable, OSError)) or is_full(error)
