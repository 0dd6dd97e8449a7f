"""The scoring worker: takes rollouts, scores them, and hands them on with their rewards.

A rollout's entry ends in the same atomic step that adds the scored rollout: a worker that dies in
between costs time, and one that lost its lease adds nothing. So each rollout comes out at most once,
scored by one version of each scorer.

A failure counts as a delivery of the rollout only if the scorer works: a rollout that scored before, or
one of a single token where none did, is scored to tell. While it does not work, or Redis is away,
rollouts go back with their counts as they were, and the worker rests for growing pauses. Neither ends
the process, which serves beside it; `trouble` tells of a scorer that does not work.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from google.protobuf.message import DecodeError

from honed.kit import tracing
from honed.kit.aio import raise_if_cancelled, unless
from honed.kit.errors import HonedError, root_cause
from honed.kit.tracing import Span
from honed.queue.holding import Holding, holding
from honed.queue.keys import SCORED
from honed.queue.messages import Delivery
from honed.queue.spans import about, work_span
from honed.queue.stream import WorkQueue
from honed.reward import metrics
from honed.reward.batching import DynamicBatcher, Result
from honed.reward.messages import rollout_input, scored_message
from honed.reward.reward import Reward
from honed.reward.scorer import BadSample, ScorerInput, ScoringTokenizer, is_outage
from honed.reward.trouble import Trouble, reason_of
from honed.v1 import common_pb2

logger = logging.getLogger(__name__)

_GROUPS: Final = 2  # one is scored while the next is fetched or the last is handed on
_RETRY_AFTER_MS: Final = 1000
_BLOCK_MS: Final = 500
_PAUSES_S: Final = (0.2, 5.0)


class ScoringWorker:
    """Takes groups of rollouts, at most two at a time, so that a slow scorer leaves the rest in the queue for others."""

    def __init__(
        self,
        queue: WorkQueue,
        batcher: DynamicBatcher,
        tokenizer: ScoringTokenizer,
        group_size: int = 256,
        check_run: Callable[[], Awaitable[None]] | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        trouble: Trouble | None = None,
    ) -> None:
        """Takes nothing until `run`.

        Args:
            queue: This process's consumer of the stage `rollouts`.
            batcher: Scores.
            tokenizer: The policy's tokenizer.
            group_size: Rollouts taken at once at most; below the batcher's bound of its queue.
            check_run: Raises FailedPrecondition if the streams are those of another run of the same name; asked before any
                rollout is taken, and again after each outage of Redis.
            sleep: How to rest while a scorer or Redis is away.
            trouble: Where to note that the scorers do not work; a new one by default.
        """
        self._queue = queue
        self._batcher = batcher
        self._tokenizer = tokenizer
        self._group_size = group_size
        self._check_run = check_run
        self._sleep = sleep
        self._pause_s = _PAUSES_S[0]
        self._resting = False
        self._scored_before: ScorerInput | None = None
        self.working = True
        """Whether rollouts are taken and scored at present."""
        self.trouble = trouble or Trouble()
        """What is known of a scorer that does not work."""

    async def run(self, stopping: asyncio.Event) -> None:
        """Works until `stopping` is set, and ends what is in hand then. Rides out any outage of Redis."""
        metrics.WORKING.set(self.working)
        while not stopping.is_set():
            try:
                await self._work(stopping)
            except Exception as error:
                raise_if_cancelled()
                cause = root_cause(error)
                if not isinstance(cause, HonedError):
                    raise
                logger.warning("no rollouts can be taken; trying again", extra={"reason": str(cause)})
                await self._rest(stopping)

    async def _work(self, stopping: asyncio.Event) -> None:
        if self._check_run is not None:
            await self._check_run()
        # What an outage left in this consumer's hands goes back as it came.
        await self._queue.release(await self._queue.pending_of())
        room = asyncio.Semaphore(_GROUPS)
        async with holding(self._queue) as held, asyncio.TaskGroup() as tasks:
            while not stopping.is_set():
                if self._resting:
                    await self._rest(stopping)
                async with room:  # taken only when there is room, so that it is worked on at once
                    group = [] if stopping.is_set() else await self._queue.take(self._group_size, _BLOCK_MS)
                if not group:
                    continue
                held.add(group)
                await room.acquire()
                task = tasks.create_task(self._score(group, held))
                task.add_done_callback(lambda _: room.release())
        await self._queue.leave()

    async def _rest(self, stopping: asyncio.Event) -> None:
        self._note(working=False)

        async def pause() -> None:
            await self._sleep(self._pause_s)

        await unless(stopping, pause())
        self._pause_s = min(_PAUSES_S[1], 2 * self._pause_s)
        self._resting = False

    def _note(self, *, working: bool) -> None:
        self.working = working
        metrics.WORKING.set(working)
        if working:
            self._pause_s = _PAUSES_S[0]

    async def _score(self, group: Sequence[Delivery], held: Holding) -> None:
        try:
            await self._score_group(group, held)
        finally:
            held.discard(group)

    async def _score_group(self, group: Sequence[Delivery], held: Holding) -> None:
        work = [(delivery, rollout) for delivery in group if (rollout := await self._parse(delivery)) is not None]
        inputs = [rollout_input(rollout, self._tokenizer) for _, rollout in work]
        try:
            with tracing.ending([work_span("score", delivery) for delivery, _ in work]) as spans:
                results = await self._batcher.score_each(inputs, patient=True)
                for span, result in zip(spans, results, strict=True):
                    _describe(span, result)
        except HonedError as error:  # the batcher stops or has no room: another try, another process
            await self._release([delivery for delivery, _ in work], error)
            return
        scored = []
        failed: list[tuple[Delivery, Exception]] = []
        for (delivery, rollout), item, result, span in zip(work, inputs, results, spans, strict=True):
            if isinstance(result, Reward):
                self._scored_before = item
                scored.append((delivery, [scored_message(rollout, result, span.traceparent)]))
            elif isinstance(result, BadSample):
                await self._fail(delivery, result, retry=False)
            else:
                failed.append((delivery, result))
        for (delivery, _), mine in zip(scored, await self._queue.hand_on_each(scored, SCORED), strict=True):
            metrics.ROLLOUTS.labels("handed_on" if mine else "lost").inc()
            if not mine:
                logger.warning("rollout was taken over meanwhile", extra=about(delivery))
        if failed and (proof := await self._why_not(work[0][1], failed[0][1])) is not None:
            self.trouble.failed([*(reason for _, reason in failed), proof])
            await self._release([delivery for delivery, _ in failed], failed[0][1])
            return
        for delivery, reason in failed:
            await self._fail(delivery, reason, retry=True)
        if not work:  # entries that are no rollouts say nothing of the scorers
            return
        if scored or failed:  # the proof has scored, where only failures came
            self.trouble.scored()
        self._note(working=True)

    async def _why_not(self, rollout: common_pb2.Rollout, error: Exception) -> Exception | None:
        """Why the scorer does not work, or None if it does: if a rollout that scored before still does.

        Where none has, a single token of `rollout` is scored to tell. Without that a process that finds nothing but bad
        rollouts at its start would try them for ever. An `error` that says itself that the scorer is away needs no such proof.
        """
        if self._scored_before is None and is_outage(error):
            return error
        token = tuple(rollout.prompt_token_ids[-1:])
        probe = self._scored_before or ScorerInput(self._tokenizer, token, response_tokens=token, reference=rollout.reference)
        try:
            [result] = await self._batcher.score_each([probe], patient=True)
        except HonedError as unable:
            return unable
        return None if isinstance(result, Reward) else result

    async def _release(self, deliveries: Sequence[Delivery], error: Exception) -> None:
        """Gives back what failed by no fault of its own; the worker takes nothing for a while."""
        self._resting = True
        self._note(working=False)
        metrics.ROLLOUTS.labels("released").inc(len(deliveries))
        reason = {"rollouts": len(deliveries), "reason": str(error), "pause_s": self._pause_s}
        logger.warning("the scorer does not work; rollouts go back to the queue", extra=reason)
        await self._queue.release(deliveries)

    async def _parse(self, delivery: Delivery) -> common_pb2.Rollout | None:
        """The rollout, or None if the entry is none: it is a dead letter then."""
        try:
            rollout = common_pb2.Rollout.FromString(delivery.message.body)
            # Other bytes may parse too: what a rollout must have tells.
            reason = "" if rollout.rollout_id and rollout.prompt_token_ids else "it has no id or no prompt"
        except DecodeError as error:
            reason = str(error)
        if not reason:
            return rollout
        logger.warning("entry is no rollout", extra={**about(delivery), "reason": reason})
        metrics.ROLLOUTS.labels("dead").inc()
        await self._queue.fail(delivery, f"no honed.v1.Rollout: {reason}", retry=False)
        return None

    async def _fail(self, delivery: Delivery, error: Exception, *, retry: bool) -> None:
        """Counts a delivery that failed by the rollout's own fault."""
        reason = reason_of(error)
        outcome = await self._queue.fail(delivery, reason, retry=retry, retry_after_ms=_RETRY_AFTER_MS)
        metrics.ROLLOUTS.labels({"retry": "retried"}.get(outcome, outcome)).inc()
        logger.warning("rollout failed", extra={**about(delivery), "reason": reason, "outcome": outcome})


def _describe(span: Span, result: Result) -> None:
    """Writes into a rollout's span what was said of it."""
    if not span.recorded:
        return
    if isinstance(result, Reward):
        scorers = [f"{score.scorer}@{score.version}" for score in result.scores]
        span.set({"honed.reward": result.value, "honed.scorers": scorers})
    else:
        span.fail(result)
