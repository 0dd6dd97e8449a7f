"""One writer task that commits what many callers submit, together.

A durable commit costs one disk flush, and writers exclude each other. Callers that arrive during a flush therefore share the
next one: the rate of single judgements grows with their concurrency. The writer is also what makes a caller's cancellation
harmless: a transaction, once begun, goes on to its end without the caller.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from honed.kit.errors import Conflict, Overloaded, Unavailable
from honed.preference.content import Row
from honed.preference.writing import Recorded

Outcome = Recorded | Conflict
Commit = Callable[[Sequence[Row]], Awaitable[list[Outcome]]]


@dataclass(frozen=True)
class GroupOptions:
    """Limits of the writer.

    Attributes:
        rows: the most rows of one transaction, unless a single submission has more.
        content_bytes: the most content of one transaction, likewise.
        waiting: submissions that may wait for their turn; above it there is no room.
        waiting_bytes: the content of all that wait, likewise; a single submission always fits.
    """

    rows: int = 1000
    content_bytes: int = 8 * 1024 * 1024
    waiting: int = 1024
    waiting_bytes: int = 128 * 1024 * 1024


@dataclass(frozen=True)
class _Submission:
    rows: Sequence[Row]
    outcomes: asyncio.Future[list[Outcome]]

    @property
    def content_bytes(self) -> int:
        return sum(len(row.content) for row in self.rows)


class GroupCommit:
    """The writer. An asynchronous context: it works inside the block, and ends with what was submitted before."""

    def __init__(self, commit: Commit, options: GroupOptions | None = None) -> None:
        """`commit` stores rows in one transaction and returns when they are durable."""
        self._commit = commit
        self._options = options or GroupOptions()
        self._queue: asyncio.Queue[_Submission | None] = asyncio.Queue()
        # What waits is counted here, not by the queue, whose limit knows numbers only.
        self._room = asyncio.Condition()
        self._waiting = self._waiting_bytes = 0
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Starts the task."""
        self._task = asyncio.create_task(self._run(), name="preference group commit")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Commits what waits, then ends the task."""
        task, self._task = self._task, None
        if task is not None:
            await self._queue.put(None)
            await task

    async def submit(self, rows: Sequence[Row], *, wait_for_room: bool) -> list[Outcome]:
        """Stores rows; returns when they are durable.

        Args:
            rows: what to store, in one transaction.
            wait_for_room: whether to wait when too many others wait, as a long import does, or to be refused.

        Raises:
            Overloaded: no room.
            Unavailable: the database did not take them, or the store is closed.
        """
        self._check_open()
        submission = _Submission(rows, asyncio.get_running_loop().create_future())
        async with self._room:
            if wait_for_room:
                await self._room.wait_for(lambda: self._fits(submission))
                self._check_open()
            elif not self._fits(submission):
                raise Overloaded(
                    f"{self._waiting} judgements of {self._waiting_bytes} bytes wait to be written; try again later",
                    retry_after_s=1.0,
                )
            self._waiting += 1
            self._waiting_bytes += submission.content_bytes
            self._queue.put_nowait(submission)
        return await submission.outcomes

    def _check_open(self) -> None:
        if self._task is None or self._task.done():
            raise Unavailable("the preference store is closed; try again when the service is ready")

    def _fits(self, submission: _Submission) -> bool:
        if self._waiting == 0:
            return True
        size = self._waiting_bytes + submission.content_bytes
        return self._waiting < self._options.waiting and size <= self._options.waiting_bytes

    async def _run(self) -> None:
        last: _Submission | None = None
        while (first := last or await self._queue.get()) is not None:
            group, last, ended = self._gather(first)
            async with self._room:
                self._waiting -= len(group)
                self._waiting_bytes -= sum(submission.content_bytes for submission in group)
                self._room.notify_all()
            try:
                outcomes = await self._commit([row for submission in group for row in submission.rows])
            except Exception as error:  # each caller gets it
                for submission in group:
                    if not submission.outcomes.done():
                        submission.outcomes.set_exception(error)
            else:
                _hand_out(group, outcomes)
            if ended:
                return

    def _gather(self, first: _Submission) -> tuple[list[_Submission], _Submission | None, bool]:
        """Takes what waits, up to the limits: the group, what did not fit any more, and whether the end was reached."""
        group, rows, size = [first], len(first.rows), first.content_bytes
        while not self._queue.empty():
            following = self._queue.get_nowait()
            if following is None:
                return group, None, True
            rows += len(following.rows)
            size += following.content_bytes
            if rows > self._options.rows or size > self._options.content_bytes:
                return group, following, False
            group.append(following)
        return group, None, False


def _hand_out(group: Sequence[_Submission], outcomes: Sequence[Outcome]) -> None:
    start = 0
    for submission in group:
        end = start + len(submission.rows)
        if not submission.outcomes.done():  # its caller may have left
            submission.outcomes.set_result(list(outcomes[start:end]))
        start = end
