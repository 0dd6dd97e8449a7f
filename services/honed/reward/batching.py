"""Dynamic batching: requests that arrive close together are scored together, by one compute thread.

Invariants:
- A batch is scored by one `WeightedSum`, taken when the batch starts: no batch mixes versions.
- A batch that fails is tried again item by item, once, so that an item fails only its own caller; unless the scorer is out of
  order for now.
- What waits is bounded; a caller beyond the bound is told when to come back, by the rate measured so far.
- Room that comes free is kept for a patient caller, as the scoring of rollouts is: others cannot keep it out.
- Items of a caller who left are not scored.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

from honed.kit.aio import background
from honed.kit.errors import DeadlineExceeded, InvalidArgument, Overloaded, Unavailable
from honed.kit.worker_thread import WorkerThread
from honed.reward import metrics
from honed.reward.reward import Reward, WeightedSum
from honed.reward.scorer import ScorerInput, is_outage

logger = logging.getLogger(__name__)

_SMOOTHING: Final = 0.2  # weight of the newest batch in the service rate
_RETRY_AFTER_S: Final = (0.05, 30.0)

Result = Reward | Exception


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """Bounds of a batch and of the queue.

    Attributes:
        max_tokens: Tokens of a batch at most; a larger single item makes a batch alone.
        max_wait_s: How long the oldest item waits for company.
        max_queued: Items that may wait.
        compute_timeout_s: How long a batch may compute. A scorer that hangs cannot be stopped, so past it the service ends, to
            be restarted.
    """

    max_tokens: int = 8192
    max_wait_s: float = 0.004
    max_queued: int = 4096
    compute_timeout_s: float = 120.0


class _Call:
    """A caller's items on their way: what is known so far, and a future for the rest."""

    def __init__(self, size: int) -> None:
        self.results: list[Result | None] = [None] * size
        self.open = size
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def settle(self, index: int, result: Result) -> None:
        self.results[index] = result
        self.open -= 1
        if self.open == 0 and not self.done.done():
            self.done.set_result(None)


@dataclass(frozen=True, slots=True)
class _Entry:
    call: _Call
    index: int
    item: ScorerInput
    cost: int
    arrived: float


class DynamicBatcher:
    """Collects items into batches. Belongs to one event loop; use it inside `running`."""

    def __init__(
        self, serving: Callable[[], WeightedSum], settings: BatchSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Scores nothing until `running`.

        Args:
            serving: Gives the reward to use; asked once for each batch.
            settings: See there.
            clock: Seconds, monotonic.
        """
        self._serving = serving
        self._settings = settings
        self._clock = clock
        self._waiting: deque[_Entry] = deque()
        self._waiting_tokens = 0
        self._kept = 0  # places that patient callers wait for
        self._arrival = asyncio.Event()
        self._room = asyncio.Event()
        self._rate = 0.0  # tokens a second; 0 before the first batch
        self._closed = False

    @property
    def queued(self) -> int:
        """Items that wait for a batch."""
        return len(self._waiting)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[DynamicBatcher]:
        """Scores for as long as the context lasts. What waits at its end fails with `Unavailable`.

        Raises:
            DeadlineExceeded: A scorer hangs; the block was cancelled, and the process should end.
        """
        thread = WorkerThread("scoring", self._settings.compute_timeout_s, "scoring a batch")
        async with background(self._run(thread)) as loop:
            try:
                yield self
            finally:
                self._close()
                loop.cancel()
                thread.stop()

    async def score(self, items: Sequence[ScorerInput]) -> list[Reward]:
        """Scores `items`, in their order.

        Raises:
            Overloaded: The queue has no room; says when to come back.
            InvalidArgument: There are more items than the queue can ever hold.
            Unavailable: The service is stopping.
            HonedError: The error of the first item that failed, in the order of the items.
        """
        rewards = []
        for result in await self.score_each(items):
            if isinstance(result, Exception):
                raise result
            rewards.append(result)
        return rewards

    async def score_each(self, items: Sequence[ScorerInput], *, patient: bool = False) -> list[Result]:
        """As `score`, but an item that fails is an exception in the list.

        Args:
            items: What to score.
            patient: Wait for room in the queue, which is kept from callers that are not. Whoever waits so bounds what it
                waits with.
        """
        if patient:
            await self._wait_for_room(len(items))
            self._admit(len(items))
        else:
            self._admit(len(items), self._kept)
        if not items:
            return []
        call, now = _Call(len(items)), self._clock()
        for index, item in enumerate(items):
            self._waiting.append(_Entry(call, index, item, item.cost, now))
            self._waiting_tokens += item.cost
        self._note_arrival()
        await call.done  # cancelled with its caller: the entries that wait see it and are skipped
        return [result for result in call.results if result is not None]

    async def _wait_for_room(self, count: int) -> None:
        self._kept += count
        try:
            while not self._closed and 0 <= self._settings.max_queued - count < len(self._waiting):
                self._room.clear()
                await self._room.wait()
        finally:
            self._kept -= count

    def _admit(self, count: int, kept: int = 0) -> None:
        if self._closed:
            raise Unavailable("the reward service is stopping; try another replica")
        self._serving()  # raises while nothing is loaded
        room = self._settings.max_queued
        if count > room:
            raise InvalidArgument("items", f"{count} items, and this server queues {room} at most; send fewer in one call")
        if len(self._waiting) + kept + count > room:
            metrics.REFUSED.inc(count)
            low, high = _RETRY_AFTER_S
            after = min(high, max(low, self._waiting_tokens / self._rate)) if self._rate else 1.0
            waiting = len(self._waiting) + kept
            raise Overloaded(f"{waiting} items wait to be scored and {room} may; {count} more do not fit", after)

    def _note_arrival(self) -> None:
        metrics.QUEUED.set(len(self._waiting))
        self._arrival.set()

    def _close(self) -> None:
        self._closed = True
        self._refuse(self._waiting)
        self._waiting.clear()
        self._room.set()

    def _refuse(self, entries: Iterable[_Entry]) -> None:
        for entry in entries:
            entry.call.settle(entry.index, Unavailable("the reward service is stopping; try another replica"))

    async def _run(self, thread: WorkerThread) -> None:
        while True:
            await self._company()
            batch = self._take()
            if not batch:
                continue
            try:
                await self._score(thread, batch)
            except BaseException:
                self._refuse(batch)
                raise

    async def _company(self) -> None:
        """Waits until a batch is full, or its oldest item has waited long enough."""
        while not self._waiting:
            self._arrival.clear()
            await self._arrival.wait()
        due = self._waiting[0].arrived + self._settings.max_wait_s
        while self._waiting_tokens < self._settings.max_tokens and (left := due - self._clock()) > 0:
            self._arrival.clear()
            try:
                async with asyncio.timeout(left):
                    await self._arrival.wait()
            except TimeoutError:
                return

    def _take(self) -> list[_Entry]:
        batch: list[_Entry] = []
        tokens = 0
        while self._waiting:
            entry = self._waiting[0]
            if batch and not entry.call.done.done() and tokens + entry.cost > self._settings.max_tokens:
                break
            self._waiting.popleft()
            self._waiting_tokens -= entry.cost
            if entry.call.done.done():
                metrics.SCORED.labels("skipped").inc()
                continue
            batch.append(entry)
            tokens += entry.cost
        metrics.QUEUED.set(len(self._waiting))
        self._room.set()
        return batch

    async def _score(self, thread: WorkerThread, batch: Sequence[_Entry]) -> None:
        serving, started = self._serving(), self._clock()
        metrics.BATCH_ITEMS.observe(len(batch))
        for entry in batch:
            metrics.WAIT.observe(started - entry.arrived)
        results = await self._compute(thread, serving, batch)
        seconds, tokens = max(self._clock() - started, 1e-6), sum(entry.cost for entry in batch)
        metrics.TOKENS.inc(tokens)
        metrics.COMPUTE.inc(seconds)
        self._rate += (_SMOOTHING if self._rate else 1.0) * (tokens / seconds - self._rate)
        metrics.TOKENS_PER_SECOND.set(self._rate)
        failed = 0
        for entry, result in zip(batch, results, strict=True):
            failed += isinstance(result, Exception)
            entry.call.settle(entry.index, result)
        metrics.SCORED.labels("failed").inc(failed)
        metrics.SCORED.labels("scored").inc(len(batch) - failed)

    async def _compute(self, thread: WorkerThread, serving: WeightedSum, batch: Sequence[_Entry]) -> list[Result]:
        try:
            return list(await thread.run(partial(serving.score, [entry.item for entry in batch])))
        except DeadlineExceeded:
            raise
        except Exception as error:
            if len(batch) == 1 or is_outage(error):  # in an outage each single try would wait as long again
                return [error] * len(batch)
            logger.warning("a batch failed; its items are tried one by one", extra={"items": len(batch), "reason": str(error)})
        results: list[Result] = []
        for entry in batch:
            try:
                results += await thread.run(partial(serving.score, [entry.item]))
            except DeadlineExceeded:
                raise
            except Exception as error:
                results.append(error)
        return results
