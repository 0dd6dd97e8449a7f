"""How much of the time something was being worked on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class BusyTime:
    """Adds up the seconds in which at least one piece of work was running."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds."""
        self._clock = clock
        self._running = 0
        self._since = 0.0
        self._total = 0.0

    @contextmanager
    def working(self) -> Iterator[None]:
        """Marks one piece of work; pieces may overlap."""
        if self._running == 0:
            self._since = self._clock()
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            if self._running == 0:
                self._total += self._clock() - self._since

    @property
    def seconds(self) -> float:
        """Busy seconds so far, what runs now included."""
        return self._total + (self._clock() - self._since if self._running else 0.0)
