"""Work beside a block: whose error leaves, and that nothing is left running."""

from __future__ import annotations

import asyncio

import pytest

from honed.kit.aio import background


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
