"""What the learner's loop asks of a source of batches, wherever they come from.

The promises are the source's as much as the loop's: what `collect` gave is in hand until it is acknowledged, dropped or put
back; and the same state gives the same batches again, so that a learner that resumes makes the same updates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from honed.learner.loop.checkpoint_files import Progress
from honed.learner.sources.trained import TrainedIds
from honed.queue.messages import Delivery


class BrokenPolicy(Exception):
    """What the policy samples cannot be trained on, rollout after rollout; says why."""


class InHand(Protocol):
    """An example in the learner's hands."""

    @property
    def rollout_id(self) -> str:
        """Names it in the journal."""

    @property
    def example(self) -> Any:
        """What the algorithm reads."""

    @property
    def delivery(self) -> Delivery | None:
        """The entry of the stream that it came as; None where there is no stream."""

    @property
    def scorers(self) -> Mapping[str, str]:
        """Version of each scorer by name."""

    def staleness(self, step: int) -> int:
        """Versions between what sampled it and the learner at `step`."""


class Source(Protocol):
    """Gives batches to a loop."""

    rollbacks: tuple[tuple[int, int], ...]
    """Fence and update of each roll-back, oldest first."""

    @property
    def waiting(self) -> int:
        """Examples in hand that are in no batch."""

    @property
    def trained(self) -> TrainedIds:
        """The rollouts behind the weights; none where rollouts do not come from outside."""

    def holds(self, rollout_id: str) -> bool:
        """Whether an example whose training is undone is in hand, or comes again."""

    def progress(self, version: str) -> Progress:
        """What a checkpoint has to know, with the label of the weights' version."""

    def restore(self, progress: Progress) -> None:
        """Goes on from a checkpoint."""

    def learned(self, held: Sequence[InHand]) -> None:
        """A batch has trained; that is not durable yet."""

    def forget(self, rollout_ids: Iterable[str]) -> None:
        """The training of these was undone."""

    async def take_over(self, predecessors: Iterable[str]) -> None:
        """Takes up what earlier learners of the run held, by their consumer names."""

    async def collect(self, size: int, step: int) -> Sequence[Any]:
        """Waits for a batch of about `size` for an update of the weights of `step`. Cancelled, it has lost nothing.

        Raises:
            BrokenPolicy: No batch will come from this policy.
        """

    def put_back(self, held: Sequence[Any]) -> None:
        """Has collected examples come again, before all others."""

    async def acknowledge(self, held: Sequence[Any]) -> None:
        """Ends examples that trained, once their effect is durable."""

    async def drop(self, held: Sequence[Any], reason: str) -> None:
        """Ends examples that are not to train."""

    async def receive(self) -> None:
        """After the last update: waits a while for what still comes."""

    async def discard(self, reason: str) -> int:
        """Drops what has been received and is in no batch; returns how many."""

    async def release(self) -> None:
        """Gives back what waits, at a stop."""

    async def close(self) -> None:
        """Ends what is under way."""
