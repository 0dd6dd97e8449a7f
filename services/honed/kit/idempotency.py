"""Answers a repeated call with the first call's answer.

For calls whose effect lives in this process: a restarted process forgets, and so does the state that the key protected.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Answer = TypeVar("Answer")


class Once(Generic[Answer]):
    """Remembers the answers of the last calls by their idempotency key. A failure is not remembered: a retry tries again."""

    def __init__(self, capacity: int = 256) -> None:
        """Keeps the newest `capacity` answers."""
        self._capacity = capacity
        self._answers: OrderedDict[str, asyncio.Future[Answer]] = OrderedDict()

    async def __call__(self, key: str, work: Callable[[], Awaitable[Answer]]) -> Answer:
        """Runs `work`, or waits for the call with the same key and returns its answer. An empty key always runs."""
        if not key:
            return await work()
        running = self._answers.get(key)
        if running is None:
            running = asyncio.ensure_future(work())
            self._answers[key] = running
            running.add_done_callback(lambda done: self._settle(key, done))
        # Shielded: the first caller may give up, and a retry of its call must find the work going on.
        return await asyncio.shield(running)

    def _settle(self, key: str, done: asyncio.Future[Answer]) -> None:
        if done.cancelled() or done.exception() is not None:
            self._answers.pop(key, None)
        while len(self._answers) > self._capacity:
            self._answers.popitem(last=False)
