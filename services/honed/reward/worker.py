"""The scoring worker: takes rollouts, scores them, and hands them on with their rewards.

A rollout's entry ends in the same atomic step that adds the scored rollout: a worker that dies in between costs time, and one
that lost its lease adds nothing. So each rollout comes out at most once, scored by one version of each scorer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final

from google.protobuf.message import DecodeError

from honed.kit.errors import Unavailable
from honed.queue.holding import Holding, holding
from honed.queue.keys import SCORED
from honed.queue.messages import Delivery, Message
from honed.queue.stream import WorkQueue
from honed.reward import metrics
from honed.reward.batching import DynamicBatcher, Result
from honed.reward.reward import Reward
from honed.reward.scorer import BadSample, ScorerFailed, ScorerInput, TokenCodec
from honed.reward.service import score_messages
from honed.v1 import common_pb2

logger = logging.getLogger(__name__)

_GROUPS: Final = 2  # one is scored while the next is fetched or the last is handed on
_RETRY_AFTER_MS: Final = 1000
_BLOCK_MS: Final = 500


class ScoringWorker:
    """Takes groups of rollouts, at most two at a time, so that a slow scorer leaves the rest in the queue for others."""

    def __init__(self, queue: WorkQueue, batcher: DynamicBatcher, codec: TokenCodec, group_size: int = 256) -> None:
        """Takes nothing until `run`.

        Args:
            queue: This process's consumer of the stage `rollouts`.
            batcher: Scores.
            codec: The policy's tokenizer.
            group_size: Rollouts taken at once at most; below the batcher's bound of its queue.
        """
        self._queue = queue
        self._batcher = batcher
        self._codec = codec
        self._group_size = group_size

    async def run(self, stopping: asyncio.Event) -> None:
        """Works until `stopping` is set, and ends what is in hand then.

        Raises:
            Unavailable: Redis is gone for good.
        """
        room = asyncio.Semaphore(_GROUPS)
        async with holding(self._queue) as held, asyncio.TaskGroup() as tasks:
            while not stopping.is_set():
                async with room:  # taken only when there is room, so that it is worked on at once
                    group = [] if stopping.is_set() else await self._queue.take(self._group_size, _BLOCK_MS)
                if not group:
                    continue
                held.add(group)
                await room.acquire()
                task = tasks.create_task(self._score(group, held))
                task.add_done_callback(lambda _: room.release())
        await self._queue.leave()

    async def _score(self, group: Sequence[Delivery], held: Holding) -> None:
        try:
            await self._score_group(group, held)
        finally:
            held.discard(group)

    async def _score_group(self, group: Sequence[Delivery], held: Holding) -> None:
        work = [(delivery, rollout) for delivery in group if (rollout := await self._parse(delivery)) is not None]
        try:
            results = await self._batcher.score_each([self._input(rollout) for _, rollout in work], patient=True)
        except Unavailable:  # the batcher stops: another process scores these
            await self._queue.release([delivery for delivery, _ in work])
            return
        scored = []
        for (delivery, rollout), result in zip(work, results, strict=True):
            if isinstance(result, Reward):
                scored.append((delivery, [_message(delivery, rollout, result)]))
            else:
                await self._fail(delivery, result)
        for (delivery, _), mine in zip(scored, await self._queue.hand_on_each(scored, SCORED), strict=True):
            metrics.ROLLOUTS.labels("handed_on" if mine else "lost").inc()
            if not mine:
                logger.warning("rollout was taken over meanwhile", extra={"entry": delivery.entry})

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
        logger.warning("entry is no rollout", extra={"entry": delivery.entry, "reason": reason})
        metrics.ROLLOUTS.labels("dead").inc()
        await self._queue.fail(delivery, f"no honed.v1.Rollout: {reason}", retry=False)
        return None

    async def _fail(self, delivery: Delivery, error: Result) -> None:
        if isinstance(error, Unavailable):
            await self._queue.release([delivery])
            return
        reason = str(error.at(None)) if isinstance(error, ScorerFailed) else f"{type(error).__name__}: {error}"
        retry = not isinstance(error, BadSample)
        outcome = await self._queue.fail(delivery, reason, retry=retry, retry_after_ms=_RETRY_AFTER_MS)
        metrics.ROLLOUTS.labels({"retry": "retried"}.get(outcome, outcome)).inc()
        logger.warning("rollout failed", extra={"entry": delivery.entry, "reason": reason, "outcome": outcome})

    def _input(self, rollout: common_pb2.Rollout) -> ScorerInput:
        return ScorerInput(self._codec, tuple(rollout.prompt_token_ids), response_tokens=tuple(rollout.response_token_ids))


def _message(delivery: Delivery, rollout: common_pb2.Rollout, reward: Reward) -> Message:
    scored = common_pb2.ScoredRollout(
        rollout=rollout, scores=score_messages(reward), reward=reward.value, missing=reward.missing
    )
    return Message(rollout.rollout_id, scored.SerializeToString(), delivery.message.traceparent)
