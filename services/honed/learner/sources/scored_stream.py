"""What the learner takes from the stream `scored`: a full batch of fresh rollouts, in stream order, each one once.

Every entry that does not train leaves under a reason that is counted where it is settled, in Redis:

- `stale`: its oldest token is more than `max_staleness` versions behind at the moment of consumption.
- `duplicate`: a rollout with this id has trained, or is in hand under another entry. Redis forgot what it had been told.
- `rolled_back`: a version sampled it that a roll-back has abandoned.
- `old_reward_model`: it was scored by a reward model that has been replaced, and such rollouts are not scored anew.
- `incomplete_group`: another of its group could not be read, or did not come in time. Groups train whole, where an algorithm
  compares their members: with one that leaves, all do.
- `run_finished`: it came after the last update. `bad_batch`: its batch was skipped.

One that cannot be read is a dead letter. A rollout can come again while it is in hand: its lease ran out while Redis or
this process stood still. Then it stays in hand once, under the newer delivery.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from google.protobuf.message import DecodeError

from honed.kit.errors import InvalidArgument
from honed.learner.data.episode import EmitsPadding, Episode, Vocabulary
from honed.learner.loop.checkpoint_files import Progress
from honed.learner.sources.hand import Hand
from honed.learner.sources.held import Groups, Held
from honed.learner.sources.source import BrokenPolicy, InHand
from honed.learner.sources.trained import TrainedIds
from honed.queue.holding import Holding
from honed.queue.keys import ROLLOUTS
from honed.queue.messages import Delivery, Message
from honed.queue.spans import about
from honed.queue.stream import WorkQueue
from honed.v1 import common_pb2

logger = logging.getLogger(__name__)

_BLOCK_MS: Final = 500
OnPromotion = Literal["rescore", "drop", "keep"]


@dataclass(frozen=True)
class IntakeSettings:
    """What is let in.

    Attributes:
        max_staleness: Versions.
        max_tokens: Prompt and response together; None for no limit.
        on_promotion: What becomes of a rollout that a replaced reward model has scored.
        group: Responses to one prompt, which train in one batch; 1 where that does not matter.
        group_timeout_s: How long the rest of a group is waited for; longer while the stream is not read to its end.
    """

    max_staleness: int
    max_tokens: int | None = None
    on_promotion: OnPromotion = "keep"
    group: int = 1
    group_timeout_s: float = 600.0


class Intake:
    """Collects batches; holds what it has collected until it is acknowledged or dropped. Implements `Source`."""

    def __init__(
        self,
        queue: WorkQueue,
        leases: Holding,
        vocabulary: Vocabulary,
        settings: IntakeSettings,
        trained: TrainedIds,
        promoted: Callable[[], Mapping[str, str]] = dict,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Takes nothing yet.

        Args:
            queue: The learner's consumer of the stage `scored`.
            leases: Renews what is in hand.
            vocabulary: Of the policy.
            settings: What is let in.
            trained: The rollouts that have trained.
            promoted: The version of each scorer whose scores are trained on; empty when that is not known.
            clock: Seconds.
        """
        self._queue, self._hand, self._vocabulary = queue, Hand(leases), vocabulary
        self._settings, self._promoted = settings, promoted
        self._clock, self._groups = clock, Groups(settings.group, settings.group_timeout_s, clock)
        self.trained = trained
        self.rollbacks: tuple[tuple[int, int], ...] = ()
        self._waiting: list[Held] = []
        self._padded: list[Held] = []
        """Rollouts with the padding token since the last batch, of versions that may still train. In hand no more."""
        self._taking: asyncio.Future[list[Delivery]] | None = None
        self._asked: tuple[float, int] = (0.0, 0)
        """When `_taking` began, seconds, and how many it takes at most."""
        self._ending: asyncio.Future[None] | None = None
        """The ends in Redis of what is in hand no more."""

    @property
    def waiting(self) -> int:
        """Rollouts in hand that are in no batch."""
        return len(self._waiting)

    def holds(self, rollout_id: str) -> bool:
        """Whether the rollout is in hand."""
        return self._hand.holds(rollout_id)

    def progress(self, version: str) -> Progress:
        """See `Source`."""
        return Progress(self.trained, version, self.rollbacks)

    def restore(self, progress: Progress) -> None:
        """See `Source`."""
        self.trained, self.rollbacks = progress.trained, progress.rollbacks

    def learned(self, held: Sequence[InHand]) -> None:
        """See `Source`."""
        self.trained.add(each.rollout_id for each in held)

    def forget(self, rollout_ids: Iterable[str]) -> None:
        """See `Source`."""
        self.trained.discard(rollout_ids)

    async def take_over(self, predecessors: Iterable[str]) -> None:
        """Takes up what earlier learners of the run held; what the checkpoint has trained on is acknowledged.

        Args:
            predecessors: Their consumer names.
        """
        deliveries: list[Delivery] = []
        for name in predecessors:
            deliveries += await self._queue.pending_of(name)
        deliveries.sort(key=lambda d: tuple(int(part) for part in d.entry.split("-")))
        # Their learner died between the checkpoint and the acknowledgement. The first delivery of an id is the one that
        # trained; another entry with the same id is a duplicate.
        owed: dict[str, Delivery] = {}
        for delivery in deliveries:
            if delivery.message.id in self.trained:
                owed.setdefault(delivery.message.id, delivery)
        await self._queue.ack(list(owed.values()))
        settled = {delivery.entry for delivery in owed.values()}
        await self._accept(d for d in deliveries if d.entry not in settled)

    async def collect(self, size: int, step: int) -> list[Held]:
        """Waits for `size` rollouts, in whole groups, that are fresh enough for an update of the weights of `step`.

        Cancel it to stop waiting; nothing is lost.

        Raises:
            BrokenPolicy: As many rollouts came with the padding token in them.
        """
        await self._ended()
        while True:
            await self._sift(step)
            if len(self._padded) >= size:
                count = len(self._padded)
                self._padded.clear()
                raise BrokenPolicy(
                    f"{count} responses with the padding token came before there was a batch of {size} others: "
                    "`honed dead list` shows what to do"
                )
            batch: list[Held] = []
            for group in self._groups.whole(self._waiting):
                batch += group
                if len(batch) >= size:
                    chosen = {held.rollout_id for held in batch}
                    self._waiting = [held for held in self._waiting if held.rollout_id not in chosen]
                    self._padded.clear()
                    return batch
            await self._accept(await self._take(size - len(batch)))

    async def acknowledge(self, held: Sequence[Held]) -> None:
        """Ends rollouts that trained, once their effect is durable."""
        await self._queue.ack(self._hand.let_go(held))

    async def drop(self, held: Sequence[Held], reason: str) -> None:
        """Ends rollouts that are not to train."""
        await self._queue.drop(self._hand.let_go(held), reason)

    def put_back(self, held: Sequence[Held]) -> None:
        """Has collected rollouts wait again, before all others."""
        self._waiting = [*held, *self._waiting]

    async def receive(self) -> None:
        """Takes what the stream has, or waits for some of it a while. Cancel it to stop waiting; nothing is lost."""
        await self._ended()
        await self._accept(await self._take(1024))

    async def discard(self, reason: str) -> int:
        """Drops what has been received and is in no batch, under a reason; returns how many. For after the last update."""
        waiting, self._waiting = self._waiting, []
        return await self._queue.drop(self._hand.let_go(waiting), reason)

    async def release(self) -> None:
        """Gives back what waits, at a stop."""
        await self._ended()
        if self._taking is not None:
            await self._accept(await self._take(1))
        waiting, self._waiting = self._waiting, []
        await self._queue.release(self._hand.let_go(waiting))

    async def close(self) -> None:
        """Ends what is under way; what Redis gave meanwhile comes again after its lease."""
        for going_on in (self._taking, self._ending):
            if going_on is not None:
                going_on.cancel()
                await asyncio.wait([going_on])
        self._taking = self._ending = None

    async def _take(self, count: int) -> list[Delivery]:
        """Takes from the stream; a cancelled call goes on, and the next one gets its answer.

        Redis may have given entries away that nobody has heard of yet: they would come again after their lease, out of order.
        """
        if self._taking is None:
            self._asked = self._clock(), count
            self._taking = asyncio.ensure_future(self._queue.take(count, block_ms=_BLOCK_MS))
        taking = self._taking
        try:
            deliveries = await asyncio.shield(taking)
        except BaseException:
            # The wait can be cancelled in the very turn in which the answer comes: then it is still there for the next call.
            if taking.cancelled() or (taking.done() and taking.exception() is not None):
                self._taking = None
            raise
        self._taking = None
        began, most = self._asked
        if len(deliveries) < most:
            self._groups.read_to_end(began)
        return deliveries

    async def _end(self, work: Coroutine[Any, Any, None]) -> None:
        """Ends deliveries in Redis. A cancelled call goes on, and the next wait for a batch waits for it first."""
        self._ending = asyncio.ensure_future(work)
        await self._ended()

    async def _ended(self) -> None:
        if self._ending is None:
            return
        ending = self._ending
        try:
            await asyncio.shield(ending)
        finally:
            if ending.done():
                self._ending = None

    async def _accept(self, deliveries: Iterable[Delivery]) -> None:
        duplicates: list[Delivery] = []
        unreadable: list[tuple[Delivery, str]] = []
        for delivery in deliveries:
            if self._hand.takes_again(delivery):
                continue
            scored = common_pb2.ScoredRollout()
            try:
                scored.ParseFromString(delivery.message.body)
                episode = Episode.from_scored(delivery.entry, scored, self._vocabulary, max_tokens=self._settings.max_tokens)
            except (DecodeError, InvalidArgument) as error:
                if isinstance(error, EmitsPadding):
                    self._padded.append(Held(delivery, error.episode))
                if scored.rollout.group_id:
                    self._groups.refuse(scored.rollout.group_id)
                unreadable.append((delivery, str(error)))
                continue
            if episode.rollout_id in self.trained or self._hand.holds(episode.rollout_id):
                duplicates.append(delivery)
                continue
            held = Held(delivery, episode, {score.scorer: score.scorer_version for score in scored.scores})
            self._hand.add(held)
            self._waiting.append(held)
        if duplicates or unreadable:
            await self._end(self._refuse(duplicates, unreadable))

    async def _refuse(self, duplicates: Sequence[Delivery], unreadable: Sequence[tuple[Delivery, str]]) -> None:
        for delivery, reason in unreadable:
            logger.warning("rollout cannot be read", extra={**about(delivery), "reason": reason})
            await self._queue.fail(delivery, reason, retry=False)
        await self._queue.drop(duplicates, "duplicate")

    async def _sift(self, step: int) -> None:
        """Takes out what waits and may not train now."""
        promoted = self._promoted() if self._settings.on_promotion != "keep" else {}
        out: dict[str, list[Held]] = {"stale": [], "rolled_back": [], "old_reward_model": []}
        fresh: list[Held] = []
        for held in self._waiting:
            if held.is_abandoned(self.rollbacks):
                out["rolled_back"].append(held)
            elif held.staleness(step) > self._settings.max_staleness:
                out["stale"].append(held)
            elif not held.is_scored_by(promoted):
                out["old_reward_model"].append(held)
            else:
                fresh.append(held)
        # What a version that is gone had sampled is not the fault of the one that took its place.
        self._padded = [
            held
            for held in self._padded
            if not held.is_abandoned(self.rollbacks) and held.staleness(step) <= self._settings.max_staleness
        ]
        for reason, torn in self._groups.torn(fresh, out).items():
            out.setdefault(reason, []).extend(torn)
        left = {held.rollout_id for gone in out.values() for held in gone}
        if not left:
            return
        self._waiting = [held for held in fresh if held.rollout_id not in left]
        # All are let go before the first wait: where that is cancelled, none may stay in hand that waits no more.
        await self._end(self._take_out({reason: self._hand.let_go(held) for reason, held in out.items()}))

    async def _take_out(self, out: Mapping[str, Sequence[Delivery]]) -> None:
        for reason, deliveries in out.items():
            if reason == "old_reward_model" and self._settings.on_promotion == "rescore":
                await self._score_anew(deliveries)
            else:
                await self._queue.drop(deliveries, reason)

    async def _score_anew(self, deliveries: Sequence[Delivery]) -> None:
        """Hands rollouts back to the reward service."""
        work = []
        for delivery in deliveries:
            rollout = common_pb2.ScoredRollout.FromString(delivery.message.body).rollout
            message = Message(rollout.rollout_id, rollout.SerializeToString(), delivery.message.traceparent)
            work.append((delivery, [message]))
        await self._queue.hand_on_each(work, ROLLOUTS)
