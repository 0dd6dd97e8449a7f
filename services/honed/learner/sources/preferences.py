"""Examples out of the preference service, for algorithms that learn from what people said directly: pairs, or single responses.

The batch of an update follows from a snapshot of the judgements, the seed and the update's number alone: a learner that
resumes, or is let go back, reads the very examples again that come next. After each pass the next snapshot is taken, with the
judgements that have come meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Final, Generic, Protocol, TypeVar

import grpc

from honed.kit.errors import HonedError, may_pass
from honed.learner.loop.checkpoint_files import Progress
from honed.learner.sources.snapshot_keys import SnapshotKeys
from honed.learner.sources.source import InHand
from honed.learner.sources.trained import TrainedIds
from honed.learner.train import rng
from honed.queue.messages import Delivery

logger = logging.getLogger(__name__)

_POLL_S: Final = 1.0
_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 30.0


class Example(Protocol):
    """What an algorithm reads of judgements."""

    @property
    def rollout_id(self) -> str:
        """Names it in the journal."""


E = TypeVar("E", bound=Example)
E_co = TypeVar("E_co", bound=Example, covariant=True)


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
class HeldExample(Generic[E]):
    """An example in the learner's hands. Implements `InHand`."""

    example: E
    delivery: Delivery | None = None
    scorers: dict[str, str] = field(default_factory=dict)

    @property
    def rollout_id(self) -> str:
        """The example's."""
        return self.example.rollout_id

    def staleness(self, step: int) -> int:
        """Nothing sampled it: 0."""
        return 0


class Judgements(Protocol[E_co]):
    """The preference service, as far as the source needs it. Calls raise an error that may pass while it does not answer."""

    wanted: str
    """Which judgements examples are made of, in words."""

    async def newest(self) -> int:
        """A number that is another one when a judgement has come; 0 while there is none."""

    async def freeze(self, key: str) -> str:
        """The judgements of now under a key, or those of then if the key was used; returns the digest of what they are."""

    async def examples(self, key: str) -> Sequence[E_co]:
        """The examples of a frozen state, in an order that does not change."""


class PreferenceExamples(Generic[E]):
    """Implements `Source`. Nothing has to be acknowledged: what does not train comes again by itself."""

    def __init__(self, run: str, judgements: Judgements[E], keys: SnapshotKeys, *, seed: int, refresh: bool) -> None:
        """Reads nothing yet.

        Args:
            run: Its name.
            judgements: Where they come from.
            keys: Of snapshots.
            seed: Of the order in each pass.
            refresh: Whether each pass has a snapshot of its own.
        """
        self._judgements, self._keys, self._seed, self._refresh = judgements, keys, seed, refresh
        self.rollbacks: tuple[tuple[int, int], ...] = ()
        self.trained = TrainedIds(run)
        self._place = Place()
        self._examples: Sequence[E] = ()
        self._useless = 0
        """The newest judgement when there were none to learn from."""
        self._loaded = ""
        """The key of the snapshot that `_examples` are of."""

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

    async def collect(self, size: int, step: int) -> list[HeldExample[E]]:
        """See `Source`. Waits while there are no examples, and while the preference service does not answer."""
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                if batch := await self._batch(size, step):
                    return batch
                reason = f"there is no {self._judgements.wanted} yet: `honed judge import` brings some"
            except (HonedError, grpc.aio.AioRpcError) as error:
                if not may_pass(error):
                    raise
                reason = (error.details() if isinstance(error, grpc.aio.AioRpcError) else None) or str(error)
            logger.warning("waiting for judgements", extra={"reason": reason, "pause_s": pause_s})
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def put_back(self, held: Sequence[HeldExample[E]]) -> None:
        """Nothing: the same update gives the same batch."""

    async def acknowledge(self, held: Sequence[HeldExample[E]]) -> None:
        """Nothing."""

    async def drop(self, held: Sequence[HeldExample[E]], reason: str) -> None:
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

    async def _batch(self, size: int, step: int) -> list[HeldExample[E]]:
        """The batch of the update that follows `step`; empty if there are no examples to make one of."""
        newest = 0 if self._place.key else await self._judgements.newest()
        if not self._place.key and newest == self._useless:
            return []  # nothing has come: no need to freeze it
        place = self._place if self._place.key else await self._next_pass(step)
        examples = await self._load(place)
        number = step - place.first + place.skipped
        # What does not fill the last batch waits for the next pass; fewer examples than one batch are a batch. Before the pass
        # is where a learner is that was let go back to published weights.
        if not 0 <= number < (len(examples) // size or min(1, len(examples))):
            place = await self._next_pass(step)
            examples, number = await self._load(place), 0
        if not examples:
            self._useless = newest
            await asyncio.to_thread(self._keys.renew)
            return []
        self._place = place
        order = rng.order(len(examples), self._seed, place.number)
        return [HeldExample(examples[i]) for i in order[number * size : (number + 1) * size]]

    async def _next_pass(self, step: int) -> Place:
        before = self._place
        number = before.number + 1 if before.key else 0
        if before.key and not self._refresh:
            return Place(before.key, before.sha256, step, 0, number)
        # A key that follows from the pass alone: a learner that dies before its checkpoint takes the same snapshot again.
        fence = self.rollbacks[-1][0] if self.rollbacks else 0
        key = await asyncio.to_thread(self._keys.key, f"{fence}/{step}/{number}")
        return Place(key, await self._judgements.freeze(key), step, 0, number)

    async def _load(self, place: Place) -> Sequence[E]:
        if self._loaded != place.key:
            self._examples = await self._judgements.examples(place.key)
            self._loaded = place.key
            logger.info("examples out of judgements", extra={"examples": len(self._examples), "pass": place.number})
        return self._examples
