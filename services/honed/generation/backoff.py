"""Growing pauses of a worker that can do nothing for the moment."""

from __future__ import annotations

import time
from collections.abc import Callable


class Backoff:
    """From `first_s`, each failure in a row doubles the pause, up to `cap_s`."""

    def __init__(self, first_s: float = 0.2, cap_s: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds."""
        self._first_s, self._cap_s, self._clock = first_s, cap_s, clock
        self._pause_s = 0.0
        self._until = clock()

    @property
    def left_s(self) -> float:
        """Seconds of the pause that are left."""
        return max(0.0, self._until - self._clock())

    def failed(self) -> float:
        """Starts a pause, and returns what is left of it. Failures within one pause count once."""
        if not self.left_s:
            self._pause_s = min(self._cap_s, 2 * self._pause_s or self._first_s)
            self._until = self._clock() + self._pause_s
        return self.left_s

    def succeeded(self) -> None:
        """Ends the row of failures."""
        self._pause_s, self._until = 0.0, self._clock()
