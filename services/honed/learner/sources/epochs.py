"""Batches of examples that are all at hand: epoch after epoch, each in an order of its own, from any place on.

The order of an epoch follows from the seed and the epoch's number alone. So two small numbers say where training stands, and
one that resumes goes on with the very example that was next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from honed.kit.errors import InvalidArgument
from honed.learner.train import rng

B = TypeVar("B")


@dataclass(frozen=True)
class Position:
    """Where a source stands: the batch of the epoch that comes next, both from 0."""

    epoch: int = 0
    batch: int = 0


class Epochs(Generic[B]):
    """Batches of `count` examples."""

    def __init__(
        self, count: int, cut: Callable[[Sequence[int]], Sequence[B]], *, seed: int, epochs: int | None = None
    ) -> None:
        """Makes the first epoch.

        Args:
            count: Of examples.
            cut: The batches of an epoch, given the order of its examples. The same order gives the same batches.
            seed: Of the orders.
            epochs: How many there are; None for no end.

        Raises:
            InvalidArgument: There is not one batch.
        """
        self._count, self._cut, self._seed, self._epochs = count, cut, seed, epochs
        self.position = Position()
        self._batches = self._of_epoch(0)
        if not self._batches:
            raise InvalidArgument("examples", f"{count} do not make one batch")

    @property
    def batches(self) -> int:
        """How many the epoch at hand has."""
        return len(self._batches)

    def next(self) -> B | None:
        """The next batch; None after the last."""
        if self._epochs is not None and self.position.epoch >= self._epochs:
            return None
        epoch, number = self.position.epoch, self.position.batch
        batch = self._batches[number]
        if number + 1 < len(self._batches):
            self.position = Position(epoch, number + 1)
        else:
            self.go_to(Position(epoch + 1))
        return batch

    def go_to(self, position: Position) -> None:
        """Goes on from there."""
        if position.epoch != self.position.epoch:
            self._batches = self._of_epoch(position.epoch)
        self.position = position

    def _of_epoch(self, number: int) -> Sequence[B]:
        if self._epochs is not None and number >= self._epochs:
            return []
        return self._cut(rng.order(self._count, self._seed, number))
