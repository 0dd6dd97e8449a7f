"""One thread for work that may hang, with a deadline.

A thread pool would be joined at the interpreter's end, so work that hangs would keep the process alive for ever. This
thread is a daemon: the process can end without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from honed.kit.errors import DeadlineExceeded

T = TypeVar("T")


class WorkerThread:
    """Runs functions one after another, off the event loop."""

    def __init__(self, name: str, timeout_s: float, what: str) -> None:
        """Starts the thread.

        Args:
            name: Shows in profiles and logs.
            timeout_s: How long one function may take, its wait for the ones before it included.
            what: What a function does, for the error of one that takes longer.
        """
        self._timeout_s, self._what = timeout_s, what
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    async def run(self, function: Callable[[], T]) -> T:
        """Runs `function` and returns what it returns, or raises what it raises.

        Raises:
            DeadlineExceeded: It took too long. The thread is stuck in it then, and so is all that comes after it; what was
                given up before its turn is not begun.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def settle(result: Any, error: Exception | None) -> None:
            if done.cancelled():
                return
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(result)

        def work() -> None:
            result, failure = None, None
            if done.cancelled():
                return
            try:
                result = function()
            except Exception as error:
                failure = error
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, result, failure)

        self._work.put(work)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await done
        except TimeoutError as error:
            if not done.cancelled():
                raise  # the function's own
            raise DeadlineExceeded(f"{self._what} took longer than {self._timeout_s:g} s") from error

    def begin(self, function: Callable[[], object]) -> None:
        """Runs `function` after what was asked for before; nobody waits for it, and what it raises is gone."""

        def work() -> None:
            with contextlib.suppress(Exception):
                function()

        self._work.put(work)

    def stop(self) -> None:
        """Ends the thread after what it is doing. Does not wait for it."""
        self._work.put(None)

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            work()
