"""The gate in front of an engine: who samples next, and who is told to come back later.

Invariants, in samples:

* At most `window` samples are in the engine at once, and none while the gate is shut.
* Each class is served in the order of arrival.
* Training always gets its floor, `1 - application_share` of the window, so that it advances however
  many applications ask.
* Applications get every other slot as soon as it is free: training beyond its floor waits for them,
  and leaves `_HEADROOM` of the window free beside those that run, so that the next ones need not
  wait either.
* Without applications, training has the whole window.
* Applications beyond `queue_limit` less the training floor are refused at once. Training is never
  refused: it claims room before it takes work.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final, Self

from honed.kit.errors import Overloaded, Unavailable

_HEADROOM: Final = 8
"""One part in so many of the window stays free for the next applications while some are there."""
_ENDS_SEEN: Final = 64
_LEAST_RETRY_S: Final = 0.1
_MOST_RETRY_S: Final = 30.0


def window_of(sequences: int) -> int:
    """The window of an engine that runs so many samples at once: a little more, so that it never waits for the next."""
    return max(2, sequences + sequences // 4)


def training_floor(window: int, application_share: float, training_limit: int) -> int:
    """Samples of the window that training always gets."""
    return min(max(1, round(window * (1 - application_share))), window - 1, training_limit)


class RequestKind(enum.Enum):
    """On whose behalf a sample is drawn."""

    APPLICATION = "application"
    TRAINING = "training"


class Claim:
    """Room that somebody has taken; a context manager, too."""

    def __init__(self, release: Callable[[], None]) -> None:
        """`release` is called once."""
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Gives the room back. Idempotent."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class RequestGate:
    """Lets samples into an engine. Belongs to one event loop."""

    def __init__(
        self,
        window: int,
        queue_limit: int,
        application_share: float,
        *,
        training_limit: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """The gate is shut at first.

        Args:
            window: Samples in the engine at once; at least 2, so that neither class can shut the
                other out.
            queue_limit: Samples of applications in flight at most, waiting ones included, together
                with the training floor.
            application_share: Share of the window that applications have when they need it, 0 to 1.
            training_limit: Training samples in flight at most, whatever is free; None for no other
                limit than the window.
            clock: Seconds, monotonic; measures how fast the queue moves.

        Raises:
            ValueError: If the window is too small.
        """
        if window < 2:
            raise ValueError(f"a window of {window} has no room for two classes of requests; take at least 2")
        self.window = window
        most = window if training_limit is None else min(window, training_limit)
        self.training_floor = training_floor(window, application_share, most)
        self.queue_limit = max(1, queue_limit - self.training_floor)
        self._training_most = most
        self._clock = clock
        self._passed = dict.fromkeys(RequestKind, 0)
        self._waiting: dict[RequestKind, deque[asyncio.Future[None]]] = {kind: deque() for kind in RequestKind}
        self._claimed = 0
        self._room_wanted: asyncio.Future[None] | None = None
        self._ends: deque[float] = deque(maxlen=_ENDS_SEEN)
        self._shut = True
        self._shut_at = clock()
        self._shut_before_s = 0.0
        self._over: str | None = None

    @property
    def in_flight(self) -> int:
        """Samples that were taken and have not ended, of both classes."""
        return self.running + sum(len(queue) for queue in self._waiting.values())

    @property
    def running(self) -> int:
        """Those of them that have passed the gate."""
        return sum(self._passed.values())

    @property
    def is_shut(self) -> bool:
        """Whether samples wait for weights to change, or for an operator."""
        return self._shut

    @property
    def shut_s(self) -> float:
        """Seconds for which the gate has been shut so far, all times together."""
        return self._shut_before_s + (self._clock() - self._shut_at if self._shut else 0.0)

    def in_flight_of(self, kind: RequestKind) -> int:
        """Samples of one class that were taken and have not ended."""
        return self._passed[kind] + len(self._waiting[kind])

    @property
    def training_room(self) -> int:
        """Samples that training may claim now: they run at once, or are next for a slot."""
        return 0 if self._shut or self._over else max(0, self._training_ceiling() - self._claimed)

    async def wait_for_training_room(self) -> int:
        """Waits until there is room for training, and returns it. One waiter at a time.

        Raises:
            Unavailable: If `end` was called.
        """
        while self.training_room == 0:
            self._check_not_over()
            self._room_wanted = asyncio.get_running_loop().create_future()
            await self._room_wanted
        return self.training_room

    def claim(self, samples: int) -> Claim:
        """Takes so much of the training room, until the claim is released.

        A prompt of many samples may take more than there is: those beyond it wait in the gate.
        """
        self._claimed += samples
        return Claim(lambda: self._unclaim(samples))

    def check_application(self, samples: int) -> None:
        """Checks that `samples` more of an application may wait.

        Raises:
            Overloaded: If not; says when to come back.
            Unavailable: If `end` was called.
        """
        self._check_not_over()
        taken = self.in_flight_of(RequestKind.APPLICATION)
        if taken + samples > self.queue_limit:
            raise Overloaded(
                f"{taken} samples of applications are in flight, of {self.queue_limit} at most; try again later",
                self._retry_after_s(),
            )

    def open(self) -> None:
        """Lets samples pass."""
        self._shut_before_s, self._shut = self.shut_s, False
        self._wake()

    def shut(self) -> None:
        """Lets samples wait."""
        if not self._shut:
            self._shut_at, self._shut = self._clock(), True

    def end(self, reason: str) -> None:
        """Refuses every sample from now on, those that wait too."""
        self._over = self._over or reason
        for queue in self._waiting.values():
            for waiter in queue:
                if not waiter.done():
                    waiter.set_exception(Unavailable(self._over))
            queue.clear()
        if self._room_wanted is not None and not self._room_wanted.done():
            self._room_wanted.set_result(None)

    @asynccontextmanager
    async def enter(self, kind: RequestKind = RequestKind.APPLICATION) -> AsyncIterator[Claim]:
        """Takes a sample, until its claim is released or the block ends.

        Raises:
            Overloaded: If it is an application's and too many wait.
            Unavailable: If `end` was called.
        """
        self._check_not_over()
        if kind is RequestKind.APPLICATION:
            self.check_application(1)
        if self._shut or self._waiting[kind] or not self._may_pass(kind):
            await self._wait(kind)
        else:
            self._passed[kind] += 1
        with Claim(lambda: self._leave(kind)) as claim:
            yield claim

    def _unclaim(self, samples: int) -> None:
        self._claimed -= samples
        self._wake()

    async def _wait(self, kind: RequestKind) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[kind].append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._leave(kind)  # it had been let in, and nobody is left to use the slot
            elif waiter in self._waiting[kind]:
                self._waiting[kind].remove(waiter)
                self._wake()  # the other class may have waited for this one
            raise

    def _leave(self, kind: RequestKind) -> None:
        self._passed[kind] -= 1
        if kind is RequestKind.APPLICATION:
            self._ends.append(self._clock())
        self._wake()

    def _wake(self) -> None:
        """Lets in whoever may pass now, and tells training of its room."""
        if self._shut or self._over is not None:
            return
        while (kind := self._next()) is not None:
            self._passed[kind] += 1
            self._waiting[kind].popleft().set_result(None)
        if self._room_wanted is not None and not self._room_wanted.done() and self.training_room:
            self._room_wanted.set_result(None)

    def _next(self) -> RequestKind | None:
        """Whose turn it is: training below its floor, then applications, then training."""
        for kind in (RequestKind.TRAINING, RequestKind.APPLICATION):
            while self._waiting[kind] and self._waiting[kind][0].done():  # cancelled, and not yet resumed
                self._waiting[kind].popleft()
        for kind in (RequestKind.TRAINING, RequestKind.APPLICATION):
            if self._waiting[kind] and self._may_pass(kind):
                return kind
        return None

    def _may_pass(self, kind: RequestKind) -> bool:
        if self.running >= self.window:
            return False
        training = self._passed[RequestKind.TRAINING]
        if kind is RequestKind.APPLICATION:
            return not self._waiting[RequestKind.TRAINING] or training >= self.training_floor
        return training < self._training_ceiling()

    def _training_ceiling(self) -> int:
        """Training samples in flight at most, as things are. Never below the floor."""
        waiting = len(self._waiting[RequestKind.APPLICATION])
        applications = self._passed[RequestKind.APPLICATION] + waiting
        if not applications:
            return self._training_most
        if waiting:
            return self.training_floor
        reserved = applications + -(-self.window // _HEADROOM)
        return max(self.training_floor, min(self._training_most, self.window - reserved))

    def _retry_after_s(self) -> float:
        """Half of what the queue of applications takes at the pace of the last ones."""
        spent = self._ends[-1] - self._ends[0] if self._ends else 0.0
        if spent <= 0:
            return 1.0
        queue_s = self.in_flight_of(RequestKind.APPLICATION) * spent / (len(self._ends) - 1)
        return min(max(queue_s / 2, _LEAST_RETRY_S), _MOST_RETRY_S)

    def _check_not_over(self) -> None:
        if self._over is not None:
            raise Unavailable(self._over)
