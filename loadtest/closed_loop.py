"""Keeps a fixed number of calls in flight until all are done."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Round:
    """One closed loop: how many tokens came, in how many seconds, and the processor seconds of this process meanwhile."""

    tokens: int
    seconds: float
    cpu_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """The rate."""
        return self.tokens / self.seconds


async def run_closed_loop(
    count: int, concurrency: int, call: Callable[[int], Awaitable[int]], *, timeout_s: float = 300.0
) -> Round:
    """Makes the calls 0 to `count - 1`, `concurrency` at a time; each one returns the tokens that it got.

    Raises:
        TimeoutError: not all were done after `timeout_s`.
        ExceptionGroup: a call failed; the others are cancelled.
    """
    numbers = iter(range(count))
    tokens = 0

    async def work() -> None:
        nonlocal tokens
        for number in numbers:
            got = await call(number)
            tokens += got  # not in one statement: the sum would be read before the wait

    start, cpu = time.perf_counter(), time.process_time()
    async with asyncio.timeout(timeout_s), asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(work())
    return Round(tokens, time.perf_counter() - start, time.process_time() - cpu)
