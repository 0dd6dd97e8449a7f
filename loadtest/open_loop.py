"""Sends requests when they are due, whether or not earlier ones have been answered, and notes what became of each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

import grpc

from loadtest.stats import OK, Outcome

Answer = AsyncIterator[int]
"""An answer as it comes: the tokens (or scored items) of each message."""


async def run_open_loop(
    arrivals: Iterable[float],
    call: Callable[[int], Answer],
    *,
    on_sent: Callable[[], None] = lambda: None,
    on_done: Callable[[Outcome], None] = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> list[Outcome]:
    """Makes one call for each arrival and returns when all have ended.

    Args:
        arrivals: When to send, seconds from now, ascending.
        call: Makes the call number i; it must have a deadline of its own, which bounds how long this function runs and how many
            calls are open at once.
        on_sent: Told of each call that begins.
        on_done: Told of each call that has ended.
        clock: Seconds.
        sleep: Waits for so many seconds.
    """
    outcomes: list[Outcome] = []
    start = clock()

    async def one(number: int, due: float) -> None:
        outcome = await _call(call(number), due, clock() - start, lambda: clock() - start)
        outcomes.append(outcome)
        on_done(outcome)

    async with asyncio.TaskGroup() as group:
        for number, due in enumerate(arrivals):
            # Also when it is late already: the calls that are open must get their turn.
            await sleep(max(0.0, start + due - clock()))
            group.create_task(one(number, due))
            on_sent()
    return outcomes


async def _call(answer: Answer, due: float, sent: float, now: Callable[[], float]) -> Outcome:
    times: list[float] = []
    units: list[int] = []
    try:
        async for count in answer:
            times.append(now())
            units.append(count)
    except grpc.aio.AioRpcError as error:
        return Outcome(due, sent, error.code().name, tuple(times), tuple(units), error.details() or "")
    return Outcome(due, sent, OK, tuple(times), tuple(units))
