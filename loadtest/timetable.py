"""When which fault of a soak is due: a kill at a steady pace, every other fault once, and again what could not be done."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable

KILL = "kill"
AGAIN_AFTER_S = 20.0


class Timetable:
    """The faults of one soak, by the time that they are due. Pure: the clock is the caller's."""

    def __init__(self, once: Iterable[str], kill_every_s: float, last_s: float, rng: random.Random) -> None:
        """Spreads the faults of `once` evenly, in random order, between the kills.

        Args:
            once: faults that happen once each.
            kill_every_s: seconds between two kills.
            last_s: nothing new is due from then on.
            rng: of the order.
        """
        names = list(once)
        rng.shuffle(names)
        kills = int(last_s / kill_every_s)
        self._last_s = last_s
        self._due = [((i + 1) * last_s / (len(names) + 1), name) for i, name in enumerate(names)]
        self._due += [(i * kill_every_s, KILL) for i in range(1, kills + 1) if i * kill_every_s < last_s]
        heapq.heapify(self._due)
        self.undone: set[str] = set(names)
        """Faults of `once` that have not happened yet."""

    def next(self, now_s: float) -> str | None:
        """The next fault that is due; None if none is."""
        return heapq.heappop(self._due)[1] if self._due and self._due[0][0] <= now_s else None

    def done(self, name: str) -> None:
        """Notes that a fault has happened."""
        self.undone.discard(name)

    def failed(self, name: str, now_s: float) -> None:
        """Puts a fault that could not be done off, as long as there is time; a kill is left for the next one."""
        if name != KILL and now_s + AGAIN_AFTER_S < self._last_s:
            heapq.heappush(self._due, (now_s + AGAIN_AFTER_S, name))
