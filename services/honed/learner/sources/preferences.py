"""Pairs of responses out of the preference service, for algorithms that learn from what people preferred directly.

The batch of an update follows from a snapshot of the judgements, the seed and the update's number alone: a learner that
resumes, or is let go back, reads the very pairs again that come next. After each pass the next snapshot is taken, with the
judgements that have come meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Final, Protocol

import grpc

from honed.kit.errors import HonedError, may_pass
from honed.learner.data.pair import Pair
from honed.learner.loop.checkpoint_files import Progress
from honed.learner.sources.source import InHand
from honed.learner.sources.trained import TrainedIds
from honed.learner.train import rng
from honed.queue.messages import Delivery

logger = logging.getLogger(__name__)

_POLL_S: Final = 1.0
_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 30.0


@dataclass(frozen=True)
class Place:
    """Where a source stands.

    Attributes:
        key: Of the snapshot: the preference service gives the same one for it again. Empty before the first.
        sha256: Of what it holds.
        first: The update that the pass over it began with.
        skipped: Batches of the pass that were not applied.
        number: Of the pass, from 0.
    """

    key: str = ""
    sha256: str = ""
    first: int = 0
    skipped: int = 0
    number: int = 0


@dataclass(frozen=True)
class HeldPair:
    """A pair in the learner's hands. Implements `InHand`."""

    example: Pair
    delivery: Delivery | None = None
    scorers: dict[str, str] = field(default_factory=dict)

    @property
    def rollout_id(self) -> str:
        """The pair's."""
        return self.example.rollout_id

    def staleness(self, step: int) -> int:
        """Nothing sampled it: 0."""
        return 0


class Judgements(Protocol):
    """The preference service, as far as the source needs it. Both raise an error that may pass while it does not answer."""

    async def freeze(self, key: str) -> str:
        """The judgements of now under a key, or those of then if the key was used; returns the digest of what they are."""

    async def pairs(self, key: str) -> list[Pair]:
        """The pairs of a frozen state, in an order that does not change."""


class PreferencePairs:
    """Implements `Source`. Nothing has to be acknowledged: what does not train comes again by itself."""

    def __init__(self, run: str, judgements: Judgements, *, seed: int, refresh: bool) -> None:
        """Reads nothing yet.

        Args:
            run: Its name.
            judgements: Where they come from.
            seed: Of the order in each pass.
            refresh: Whether each pass has a snapshot of its own.
        """
        self._run, self._judgements, self._seed, self._refresh = run, judgements, seed, refresh
        self.rollbacks: tuple[tuple[int, int], ...] = ()
        self.trained = TrainedIds(run)
        self._place = Place()
        self._pairs: list[Pair] = []
        self._empty = 0
        """Snapshots without a pair so far: the next one needs a key of its own."""
        self._loaded = ""
        """The key of the snapshot that `_pairs` are of."""

    @property
    def waiting(self) -> int:
        """None: a batch is made when it is asked for."""
        return 0

    def holds(self, rollout_id: str) -> bool:
        """Each comes again in the passes that follow."""
        return True

    def progress(self, version: str) -> Progress:
        """See `Source`."""
        return Progress(self.trained, version, self.rollbacks, asdict(self._place))

    def restore(self, progress: Progress) -> None:
        """See `Source`."""
        self._place, self.rollbacks = Place(**progress.position), progress.rollbacks
        self.trained = progress.trained  # of a run that learned from rollouts before: it may do so again

    def learned(self, held: Sequence[InHand]) -> None:
        """Nothing: the update's number says it."""

    def forget(self, rollout_ids: Iterable[str]) -> None:
        """Nothing."""

    @property
    def snapshot(self) -> str:
        """Digest of the judgements that are read now; empty before the first."""
        return self._place.sha256

    async def take_over(self, predecessors: Iterable[str]) -> None:
        """Nothing: they held nothing."""

    async def collect(self, size: int, step: int) -> list[HeldPair]:
        """See `Source`. Waits while there are no pairs, and while the preference service does not answer."""
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                if batch := await self._batch(size, step):
                    return batch
                reason = "there is no comparison and no ranking yet: `honed judge import` brings some"
            except (HonedError, grpc.aio.AioRpcError) as error:
                if not may_pass(error):
                    raise
                reason = (error.details() if isinstance(error, grpc.aio.AioRpcError) else None) or str(error)
            logger.warning("waiting for judgements", extra={"reason": reason, "pause_s": pause_s})
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def put_back(self, held: Sequence[HeldPair]) -> None:
        """Nothing: the same update gives the same batch."""

    async def acknowledge(self, held: Sequence[HeldPair]) -> None:
        """Nothing."""

    async def drop(self, held: Sequence[HeldPair], reason: str) -> None:
        """Passes the batch over."""
        self._place = Place(**{**asdict(self._place), "skipped": self._place.skipped + 1})

    async def receive(self) -> None:
        """Nothing comes by itself."""
        await asyncio.sleep(_POLL_S)

    async def discard(self, reason: str) -> int:
        """None."""
        return 0

    async def release(self) -> None:
        """Nothing."""

    async def close(self) -> None:
        """Nothing."""

    async def _batch(self, size: int, step: int) -> list[HeldPair]:
        """The batch of the update that follows `step`; empty if there are no pairs to make one of."""
        place = self._place if self._place.key else await self._next_pass(step)
        pairs = await self._load(place)
        number = step - place.first + place.skipped
        # What does not fill the last batch waits for the next pass; fewer pairs than one batch are a batch. Before the pass is
        # where a learner is that was let go back to published weights.
        if not 0 <= number < (len(pairs) // size or min(1, len(pairs))):
            place = await self._next_pass(step)
            pairs, number = await self._load(place), 0
        if not pairs:
            self._empty += 1
            return []
        self._place = place
        order = rng.order(len(pairs), self._seed, place.number)
        return [HeldPair(pairs[i]) for i in order[number * size : (number + 1) * size]]

    async def _next_pass(self, step: int) -> Place:
        before = self._place
        number = before.number + 1 if before.key else 0
        if before.key and not self._refresh:
            return Place(before.key, before.sha256, step, 0, number)
        # A key that follows from the pass alone: a learner that dies before its checkpoint takes the same snapshot again.
        fence = self.rollbacks[-1][0] if self.rollbacks else 0
        key = f"{self._run}/learner/{fence}/{step}/{number}/{self._empty}"
        return Place(key, await self._judgements.freeze(key), step, 0, number)

    async def _load(self, place: Place) -> list[Pair]:
        if self._loaded != place.key:
            self._pairs = await self._judgements.pairs(place.key)
            self._loaded = place.key
            logger.info("pairs of people's judgements", extra={"pairs": len(self._pairs), "pass": place.number})
        return self._pairs
