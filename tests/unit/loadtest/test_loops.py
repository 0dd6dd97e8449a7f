"""Open and closed loops, on a clock of their own."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from loadtest.closed_loop import run_closed_loop
from loadtest.open_loop import run_open_loop


class Clock:
    """Time that moves when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        for _ in range(4):  # others get their turn
            await asyncio.sleep(0)
        self.now += seconds


async def test_arrivals_do_not_wait_for_answers():
    clock, release, open_calls = Clock(), asyncio.Event(), []

    async def call(number: int) -> AsyncIterator[int]:
        open_calls.append(number)
        if len(open_calls) == 3:
            release.set()
        await release.wait()
        yield 1

    async with asyncio.timeout(30):
        outcomes = await run_open_loop([0.5, 1.0, 1.5], call, clock=clock, sleep=clock.sleep)
    assert [outcome.scheduled for outcome in sorted(outcomes, key=lambda o: o.scheduled)] == [0.5, 1.0, 1.5]
    assert [outcome.arrivals for outcome in outcomes] == [(1.5,)] * 3


async def test_a_late_request_keeps_its_schedule():
    clock = Clock()

    async def call(number: int) -> AsyncIterator[int]:
        if number == 0:
            clock.now += 3.0  # the generator itself stands still
        yield 2

    outcomes = await run_open_loop([0.5, 1.0], call, clock=clock, sleep=clock.sleep)
    late = outcomes[1]
    assert (late.scheduled, late.sent, late.e2e, late.units) == (1.0, 4.0, 3.0, (2,))


async def test_a_failure_keeps_what_had_come():
    clock = Clock()

    async def call(number: int) -> AsyncIterator[int]:
        yield 1
        metadata = grpc.aio.Metadata()
        raise grpc.aio.AioRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, metadata, metadata, details="come back later")

    [outcome] = await run_open_loop([0.1], call, clock=clock, sleep=clock.sleep)
    assert (outcome.code, outcome.reason, outcome.units, outcome.ok) == ("RESOURCE_EXHAUSTED", "come back later", (1,), False)


async def test_a_closed_loop_never_has_more_in_flight_than_asked():
    running, most, done = 0, 0, []

    async def call(number: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        done.append(number)
        return number

    result = await run_closed_loop(10, 3, call)
    assert most == 3
    assert sorted(done) == list(range(10))
    assert result.tokens == sum(range(10))


async def test_a_closed_loop_ends_with_the_first_failure_and_by_its_deadline():
    async def fail(number: int) -> int:
        raise RuntimeError("no")

    async def hang(number: int) -> int:
        await asyncio.Event().wait()
        return 0

    with pytest.raises(ExceptionGroup):
        await run_closed_loop(4, 2, fail)
    with pytest.raises(TimeoutError):
        await run_closed_loop(4, 2, hang, timeout_s=0.01)
