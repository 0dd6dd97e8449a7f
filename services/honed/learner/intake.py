"""What the learner takes from the stream `scored`: a full batch of fresh rollouts, in stream order, each one once.

Every entry that does not train leaves under a reason that is counted where it is settled, in Redis: `stale` (its oldest token
is more than `max_staleness` versions behind at the moment of consumption), `run_finished` (it came after the last step). One
that cannot be read is a dead letter.

A rollout can come a second time: its lease ran out while Redis or this process stood still, or Redis crashed and lost the
acknowledgement. What is in hand then stays in hand once, under the newer delivery; what has trained for good is acknowledged
again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from honed.kit.errors import InvalidArgument
from honed.learner.episodes import Episode, Vocabulary
from honed.queue.holding import Holding
from honed.queue.messages import Delivery
from honed.queue.stream import WorkQueue
from honed.v1 import common_pb2

REMEMBERED = 100_000
"""Rollouts whose training is remembered; a crash of Redis loses seconds, not hours."""


@dataclass(frozen=True)
class Held:
    """A rollout in the learner's hands."""

    delivery: Delivery
    episode: Episode
    reward_model_version: str

    def staleness(self, step: int) -> int:
        """Versions between the oldest token and the learner at `step`.

        A rollout of a step that a resumed learner has yet to make again is not stale: 0.
        """
        return max(0, step - min(span.version.step for span in self.episode.spans))


class Intake:
    """Collects batches; holds what it has collected until it is acknowledged or dropped."""

    def __init__(
        self, queue: WorkQueue, leases: Holding, vocabulary: Vocabulary, *, max_staleness: int, max_tokens: int | None = None
    ) -> None:
        """`queue` is the learner's consumer of the stage `scored`; `leases` renews what it holds."""
        self._queue = queue
        self._leases = leases
        self._vocabulary = vocabulary
        self._max_staleness = max_staleness
        self._max_tokens = max_tokens
        self._waiting: list[Held] = []
        self._in_hand: dict[str, Delivery] = {}
        """The newest delivery of each entry that waits, or is collected and not yet let go."""
        self._trained: dict[str, None] = {}

    async def take_over(self, predecessors: Iterable[str], consumed: frozenset[str]) -> None:
        """Takes up what earlier learners of the run held; what they trained on for good is acknowledged.

        Args:
            predecessors: their consumer names.
            consumed: rollout ids that the checkpoint has trained on and that may not have been acknowledged.
        """
        self._remember(consumed)
        deliveries: list[Delivery] = []
        for name in predecessors:
            deliveries += await self._queue.pending_of(name)
        deliveries.sort(key=lambda d: tuple(int(part) for part in d.entry.split("-")))
        await self._accept(deliveries)

    async def collect(self, size: int, step: int) -> list[Held]:
        """Waits for `size` rollouts that are fresh enough for an update of the weights of `step`.

        Cancel it to stop waiting; nothing is lost.
        """
        while True:
            await self._drop_stale(step)
            if len(self._waiting) >= size:
                batch, self._waiting = self._waiting[:size], self._waiting[size:]
                return batch
            await self._accept(await self._queue.take(size - len(self._waiting), block_ms=500))

    async def acknowledge(self, held: Sequence[Held]) -> None:
        """Ends collected rollouts, once their effect is durable."""
        self._remember(each.episode.rollout_id for each in held)
        await self._queue.ack(self._let_go(held))

    async def discard(self, reason: str) -> int:
        """Drops whatever waits, here and in the stream, under a reason; returns how many. For after the last step."""
        await self._accept(await self._queue.take(1024, block_ms=500))
        waiting, self._waiting = self._waiting, []
        return await self._queue.drop(self._let_go(waiting), reason)

    async def release(self) -> None:
        """Gives back what waits, at a stop."""
        waiting, self._waiting = self._waiting, []
        await self._queue.release(self._let_go(waiting))

    async def dropped(self) -> dict[str, int]:
        """Rollouts that did not train, by reason, over the whole run; dead letters among them."""
        stats = await self._queue.stats()
        return {**stats.dropped, **({"dead_letter": stats.dead} if stats.dead else {})}

    async def _accept(self, deliveries: Iterable[Delivery]) -> None:
        for delivery in deliveries:
            if (earlier := self._in_hand.get(delivery.entry)) is not None:
                self._leases.discard([earlier])
                self._hold(delivery)
                continue
            if delivery.message.id in self._trained:
                await self._queue.ack([delivery])
                continue
            try:
                scored = common_pb2.ScoredRollout.FromString(delivery.message.body)
                episode = Episode.from_scored(delivery.entry, scored, self._vocabulary, max_tokens=self._max_tokens)
            except (DecodeError, InvalidArgument) as error:
                await self._queue.fail(delivery, str(error), retry=False)
                continue
            self._hold(delivery)
            self._waiting.append(Held(delivery, episode, _reward_models(scored.scores)))

    async def _drop_stale(self, step: int) -> None:
        stale = [held for held in self._waiting if held.staleness(step) > self._max_staleness]
        if stale:
            await self._queue.drop(self._let_go(stale), "stale")
            self._waiting = [held for held in self._waiting if held.staleness(step) <= self._max_staleness]

    def _let_go(self, held: Sequence[Held]) -> list[Delivery]:
        deliveries = [self._in_hand.pop(each.delivery.entry, each.delivery) for each in held]
        self._leases.discard(deliveries)
        return deliveries

    def _hold(self, delivery: Delivery) -> None:
        self._in_hand[delivery.entry] = delivery
        self._leases.add([delivery])

    def _remember(self, rollout_ids: Iterable[str]) -> None:
        self._trained.update(dict.fromkeys(rollout_ids))
        for rollout_id in list(itertools.islice(self._trained, max(0, len(self._trained) - REMEMBERED))):
            del self._trained[rollout_id]


def _reward_models(scores: Sequence[common_pb2.Score]) -> str:
    return ",".join(f"{score.scorer}@{score.scorer_version}" for score in scores)
