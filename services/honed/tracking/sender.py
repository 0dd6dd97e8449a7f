"""Sends a run to one tracker, in the background: nothing of the run waits for it, and nothing is lost while it is away.

What a tracker raises is tried again, with growing pauses, from what it has by then; one warning says that it is away, and one
line that it is back. How much was sent stands in a small file, and for trackers that can tell the tracker itself is asked: a
conductor that was killed goes on in the same run of the tracker, with neither a hole nor a second copy.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable
from typing import Final

from honed.kit.aio import background, raise_if_cancelled
from honed.kit.errors import root_cause
from honed.kit.worker_thread import WorkerThread
from honed.tracking.port import UPDATES, Mark, Outcome, Point, Sent, TrackedRun, Tracker
from honed.tracking.position import Position, PositionFile

logger = logging.getLogger(__name__)

_CALL_S: Final = 120.0
_PAUSES_S: Final = (1.0, 60.0)
_BATCH: Final = 100
_AHEAD: Final = 1000
_ALARM_AFTER_S: Final = 300.0
_REASON: Final = 300
_CREDENTIALS: Final = re.compile(r"//[^/@\s]+@")  # of a URL, which libraries show as it is

Points = Callable[[Sent], AsyncIterator[Point]]
"""From what was sent to what comes after it, without an end."""


class Sender:
    """One tracker of one run."""

    def __init__(
        self,
        name: str,
        make: Callable[[], Tracker],
        run: TrackedRun,
        points: Points,
        file: PositionFile,
        alarm: Callable[[str], None],
        *,
        pauses_s: tuple[float, float] = _PAUSES_S,
        alarm_after_s: float = _ALARM_AFTER_S,
    ) -> None:
        """Sends nothing yet.

        Args:
            name: The tracker's.
            make: Makes the tracker, in its thread: the first use of a library loads it.
            run: What is tracked.
            points: What is sent.
            file: Where the position is kept.
            alarm: Called with what a person should know, and with an empty text when that is over.
            pauses_s: After a failure: the first, and the longest.
            alarm_after_s: How long a tracker may be away before that is an alarm.
        """
        self._name, self._make, self._run, self._points, self._file = name, make, run, points, file
        self._alarm, self._pauses_s, self._alarm_after_s = alarm, pauses_s, alarm_after_s
        self._thread = WorkerThread(f"tracking {name}", _CALL_S, f"a call of {name}")
        self._tracker: Tracker | None = None
        self._position = Position("")
        self._outcome: Outcome | None = None
        self._changed = asyncio.Event()
        self._settled = asyncio.Event()
        self._away_since: float | None = None

    def finish(self, outcome: Outcome) -> None:
        """Lets the tracker know, after the last update, what the run has come to."""
        self._outcome = outcome
        self._settled.clear()
        self._changed.set()

    async def settled(self) -> None:
        """Returns when the tracker has all of it, the outcome too."""
        await self._settled.wait()

    async def run(self) -> None:
        """Sends until it is cancelled."""
        pause_s = self._pauses_s[0]
        try:
            while True:
                try:
                    await self._session()
                    pause_s = self._pauses_s[0]
                except Exception as error:  # whatever it is, the run goes on
                    raise_if_cancelled()
                    self._failed(root_cause(error))
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, self._pauses_s[1])
        finally:
            self._close()

    def _close(self) -> None:
        """Closes the tracker after the call that is under way; nobody waits for that."""
        if (tracker := self._tracker) is not None:
            self._thread.begin(tracker.close)
        self._thread.stop()

    async def _session(self) -> None:
        """From an opening until the run has come to something and then goes on, or to a failure."""
        if self._tracker is None:
            self._tracker = await self._thread.run(self._make)
        tracker = self._tracker
        before = await asyncio.to_thread(self._file.read, tracker.store)
        opened = await self._thread.run(lambda: tracker.open(self._run, before.id, before.sent))
        self._position = Position(tracker.store, opened.id, dict(before.sent if opened.sent is None else opened.sent))
        await self._note()
        self._answers()
        queue: asyncio.Queue[Point] = asyncio.Queue(_AHEAD)

        async def fill() -> None:
            async for point in self._points(dict(self._position.sent)):
                await queue.put(point)
                self._changed.set()

        async with background(fill()):
            while (outcome := self._due(queue)) is None:
                await self._log(tracker, await self._taken(queue))
            await self._thread.run(lambda: tracker.finish(outcome))
            if self._outcome is outcome:
                self._outcome = None
                self._settled.set()
            while queue.empty() and self._outcome is None:  # a run that goes back trains on
                self._changed.clear()
                await self._changed.wait()

    async def _taken(self, queue: asyncio.Queue[Point]) -> list[Point]:
        """What is there, a batch at most; waits until something has changed."""
        await self._changed.wait()
        self._changed.clear()
        points = [queue.get_nowait() for _ in range(min(queue.qsize(), _BATCH))]
        if not queue.empty():
            self._changed.set()
        return points

    async def _log(self, tracker: Tracker, points: list[Point]) -> None:
        if not points:
            return
        await self._thread.run(lambda: tracker.log(points))
        for point in points:
            self._position.sent[point.series] = Mark(point.at_ms, point.step)
        await self._note()

    def _due(self, queue: asyncio.Queue[Point]) -> Outcome | None:
        """The outcome, once everything before it is sent."""
        last = self._position.sent.get(UPDATES)
        if self._outcome is None or not queue.empty() or (last.step if last else 0) < self._outcome.update:
            return None
        return self._outcome

    async def _note(self) -> None:
        await asyncio.to_thread(self._file.write, self._position)

    def _answers(self) -> None:
        if self._away_since is not None:
            logger.info("the tracker answers again; what it missed is sent", extra={"tracker": self._name})
            self._alarm("")
        self._away_since = None

    def _failed(self, error: BaseException) -> None:
        now = asyncio.get_running_loop().time()
        reason = _CREDENTIALS.sub("//", f"{type(error).__name__}: {error}")[:_REASON]
        if self._away_since is None:
            self._away_since = now
            about = {"tracker": self._name, "reason": reason}
            logger.warning("the tracker does not take the run; it is tried again, and gets what it missed", extra=about)
        if now - self._away_since >= self._alarm_after_s:
            self._alarm(f"{self._name} does not take the run: {reason}; training goes on, and it gets what it missed")
