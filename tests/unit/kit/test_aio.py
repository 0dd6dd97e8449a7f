"""Work beside a block: whose error leaves, and that nothing is left running."""

from __future__ import annotations

import asyncio

import pytest

from honed.kit.aio import background, raise_if_cancelled


async def for_ever() -> None:
    await asyncio.Event().wait()


async def test_the_work_is_cancelled_when_the_block_ends() -> None:
    async with background(for_ever()) as task:
        await asyncio.sleep(0)
    assert task.cancelled()


async def test_the_blocks_own_error_leaves_as_it_is() -> None:
    with pytest.raises(KeyError, match="mine"):
        async with background(for_ever()) as task:
            raise KeyError("mine")
    assert task.cancelled()


async def test_work_that_fails_cancels_the_block_and_its_error_leaves_alone() -> None:
    async def fails() -> None:
        await asyncio.sleep(0)
        raise KeyError("theirs")

    with pytest.raises(KeyError, match="theirs"):
        async with background(fails()):
            await asyncio.Event().wait()


async def test_a_cancelled_block_stays_cancelled() -> None:
    entered = asyncio.Event()

    async def block() -> None:
        async with background(for_ever()):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.ensure_future(block())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def fails_when_it_is_cancelled() -> None:
    try:
        await for_ever()
    except asyncio.CancelledError:
        raise ConnectionError("the engine is dead") from None


async def test_a_loop_that_goes_on_after_any_error_ends_when_it_is_cancelled_all_the_same() -> None:
    """The group of errors takes the place of the cancellation: without the check the loop would begin anew."""
    begun = asyncio.Event()

    async def loop() -> None:
        while True:
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(fails_when_it_is_cancelled())
                    begun.set()
                    await for_ever()
            except Exception:
                raise_if_cancelled()

    task = asyncio.create_task(loop())
    await begun.wait()
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task], timeout=5)
    assert task.cancelled()


async def test_an_error_by_itself_is_no_cancellation() -> None:
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(-1, result=None))
            raise KeyError("mine")
    except* KeyError:
        raise_if_cancelled()
