"""Rates: how much happened within a window. What is counted for life ends every long run."""

from __future__ import annotations

from collections import deque


class Recent:
    """Counts events within the last `window_s` seconds."""

    def __init__(self, window_s: float) -> None:
        """Nothing has happened."""
        self._window_s = window_s
        self._times: deque[float] = deque()

    def add(self, now: float) -> int:
        """Counts an event at `now`, seconds; returns how many there were in the window."""
        self._times.append(now)
        return self.count(now)

    def count(self, now: float) -> int:
        """How many events the window that ends at `now` holds."""
        while self._times and self._times[0] <= now - self._window_s:
            self._times.popleft()
        return len(self._times)


class Growth:
    """By how much a counter rose within the last `window_s` seconds. A counter that falls (deleted, lost) begins anew."""

    def __init__(self, window_s: float) -> None:
        """No reading yet: what the counter holds at the first one is not growth."""
        self._window_s = window_s
        self._rises: deque[tuple[float, int]] = deque()
        self._last: int | None = None
        self._total = 0

    def read(self, value: int, now: float) -> int:
        """Takes a reading at `now`, seconds; returns the growth within the window."""
        if self._last is not None and value > self._last:
            self._rises.append((now, value - self._last))
            self._total += value - self._last
        self._last = value
        while self._rises and self._rises[0][0] <= now - self._window_s:
            self._total -= self._rises.popleft()[1]
        return self._total
