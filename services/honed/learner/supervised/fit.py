"""Trains on examples that are all at hand, within a budget, and goes on where it was when it is interrupted.

Every phase before the online loop is this, over an algorithm of its own. A checkpoint holds weights, optimizer, generator and
the place in the data: a training that was killed and begun again ends with the bits of one that was not, unless its budget is
one of seconds.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, Literal

from honed.kit.errors import DataLoss, Overloaded
from honed.learner.loop.checkpoint import CheckpointStore
from honed.learner.loop.checkpoint_files import Checkpoint, Progress
from honed.learner.sources.epochs import Epochs, Position
from honed.learner.sources.trained import TrainedIds
from honed.learner.train.algorithm import B
from honed.learner.train.schedule import Rate
from honed.learner.train.trainer import M, Trainer

logger = logging.getLogger(__name__)

_FENCE: Final = 0
_SAVE_EVERY_S: Final = 30.0
_SAVING_SHARE: Final = 0.05
_RECENT: Final = 50


@dataclass(frozen=True)
class Budget(Generic[B]):
    """How long to train.

    Attributes:
        amount: Until so much has been read.
        of: How much a batch is of it: its tokens, say.
        seconds: And not longer than this, over all tries; None for no limit, and a result that repeats exactly.
    """

    amount: int
    of: Callable[[B], int]
    seconds: float | None = None


@dataclass(frozen=True)
class Standing:
    """Where a training stands after a step; `done` is the share of its budget that is used, 0 to 1."""

    step: int
    loss: float
    amount: int
    per_second: float
    done: float


@dataclass(frozen=True)
class Outcome:
    """What came out.

    Attributes:
        steps: Optimizer steps, of all tries.
        amount: What was read of the budget.
        loss: Mean over the last steps, at most 50.
        seconds: Of all tries.
        stopped_by: What of the budget ended it.
        resumed_at: The step of the checkpoint that it began from; 0 without one.
    """

    steps: int
    amount: int
    loss: float
    seconds: float
    stopped_by: Literal["amount", "seconds"]
    resumed_at: int


class Checkpoints:
    """Where an interrupted training is kept, and how often."""

    def __init__(self, directory: Path, *, every_s: float = _SAVE_EVERY_S, clock: Callable[[], float] = time.monotonic) -> None:
        """`every_s` is made longer where saving takes long: training is what the time is for."""
        self._store, self._every_s, self._clock = CheckpointStore(directory, keep=1), every_s, clock
        self._due = clock() + every_s

    def latest(self) -> Checkpoint | None:
        """The checkpoint to go on from. A damaged one is left: nobody has seen its weights, so training begins anew."""
        try:
            return self._store.latest()
        except DataLoss as error:
            logger.warning("the checkpoint is damaged; training begins anew", extra={"reason": str(error)})
            return None

    def save_if_due(self, make: Callable[[], Checkpoint]) -> None:
        """Writes a checkpoint now and then. On a full disk training goes on without a new one."""
        started = self._clock()
        if started < self._due:
            return
        try:
            self._store.save(make(), _FENCE)
        except Overloaded as error:
            logger.warning("no checkpoint; training goes on", extra={"reason": str(error)})
        took = self._clock() - started
        self._due = self._clock() + max(self._every_s, took / _SAVING_SHARE)


class Fit(Generic[B, M]):
    """One training."""

    def __init__(
        self,
        trainer: Trainer[B, M],
        source: Epochs[B],
        budget: Budget[B],
        rate: Rate,
        *,
        checkpoints: Checkpoints | None = None,
        progress: Callable[[Standing], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Trains nothing yet.

        Args:
            trainer: With fresh weights; its algorithm tells a figure `loss`.
            source: At its beginning.
            budget: How long to train.
            rate: The learning rate.
            checkpoints: Where an interrupted training is kept; None keeps nothing.
            progress: Called after every step; raising from it ends the training.
            clock: Seconds.
        """
        self._trainer, self._source, self._budget, self._rate = trainer, source, budget, rate
        self._checkpoints, self._progress, self._clock = checkpoints, progress, clock
        self._amount, self._seconds_before = 0, 0.0
        self._losses: deque[float] = deque(maxlen=_RECENT)

    def run(self) -> Outcome:
        """Trains until the budget is used up or the source has no more.

        Raises:
            BadBatch: The loss or the weights are no longer finite; says at which step and what to try.
        """
        resumed_at = self._resume()
        started, before = self._clock(), self._amount
        self._started = started
        while (done := self._done()) < 1.0 and (batch := self._source.next()) is not None:
            figures = self._trainer.update(batch, rate=self._rate(self._trainer.step, done))
            self._amount += self._budget.of(batch)
            self._losses.append(figures["loss"])
            per_second = (self._amount - before) / max(self._clock() - started, 1e-9)
            self._progress(Standing(self._trainer.step, figures["loss"], self._amount, per_second, self._done()))
            if self._checkpoints is not None:
                self._checkpoints.save_if_due(self._checkpoint)
        return Outcome(
            steps=self._trainer.step,
            amount=self._amount,
            loss=sum(self._losses) / max(1, len(self._losses)),
            seconds=self._seconds(),
            stopped_by="amount" if self._amount >= self._budget.amount else "seconds",
            resumed_at=resumed_at,
        )

    def _seconds(self) -> float:
        return self._seconds_before + self._clock() - self._started

    def _done(self) -> float:
        of_time = self._seconds() / self._budget.seconds if self._budget.seconds else 0.0
        return min(1.0, max(self._amount / self._budget.amount, of_time))

    def _checkpoint(self) -> Checkpoint:
        position: dict[str, Any] = {
            "epoch": self._source.position.epoch,
            "batch": self._source.position.batch,
            "amount": self._amount,
            "seconds": self._seconds(),
            "losses": list(self._losses),
        }
        return Checkpoint(self._trainer.state(), Progress(TrainedIds(""), position=position))

    def _resume(self) -> int:
        found = self._checkpoints.latest() if self._checkpoints is not None else None
        if found is None:
            return 0
        self._trainer.load_state(found.trainer)
        position = found.progress.position
        self._source.go_to(Position(int(position["epoch"]), int(position["batch"])))
        self._amount, self._seconds_before = int(position["amount"]), float(position["seconds"])
        self._losses.extend(position["losses"])
        logger.info("training goes on from its checkpoint", extra={"step": self._trainer.step})
        return self._trainer.step
