"""Two things at once: waiting for the first of them, work beside a block, and the end of both."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


async def unless(stopping: asyncio.Event, work: Coroutine[Any, Any, Result]) -> Result | None:
    """Runs `work` to its end and returns its result, or cancels it and returns None once `stopping` is set."""
    task = asyncio.ensure_future(work)
    stop = asyncio.ensure_future(stopping.wait())
    try:
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        stop.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def raise_if_cancelled() -> None:
    """For loops that go on after any error: raises CancelledError if this task has been cancelled.

    A task group that is cancelled while a task in it fails raises the group of errors, and the cancellation is gone (Python
    3.11 and 3.12). Who catches that error would go on for ever.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


@contextlib.asynccontextmanager
async def background(work: Coroutine[Any, Any, object]) -> AsyncIterator[asyncio.Task[object]]:
    """Runs `work` beside the block, and cancels it when the block ends.

    Work that fails cancels the block, and its error leaves the context. So do the block's own errors: none is in a group.
    """
    error: Exception | None = None
    try:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(work)
            try:
                yield task
            except Exception as raised:
                error = raised
            finally:
                task.cancel()
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from failed
    if error is not None:
        raise error
