"""Updates in a thread, all or nothing: an update that cannot be applied, or is stopped, leaves the state before it."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NoReturn

from torch import Tensor

from honed.artifacts.version import VersionId
from honed.kit.errors import DataLoss
from honed.learner.loop.checkpoint import CheckpointStore
from honed.learner.models.policy import PolicyModel
from honed.learner.train.average import WeightAverage
from honed.learner.train.state import TrainerState
from honed.learner.train.trainer import BadBatch, Interrupted, Metrics, Trainer

logger = logging.getLogger(__name__)

_LAST_PASS_S: Final = 60.0


def end_process(reason: str) -> NoReturn:
    """Ends the process at once: a thread that hangs in a kernel can be ended in no other way."""
    logger.critical(reason)
    logging.shutdown()
    os._exit(1)


class Training:
    """A trainer whose updates are undone when they fail."""

    def __init__(
        self,
        trainer: Trainer[Any, PolicyModel],
        checkpoints: CheckpointStore,
        *,
        timeout_s: float = 3600.0,
        stop_within_s: float = 5.0,
        die: Callable[[str], NoReturn] = end_process,
    ) -> None:
        """Trains nothing yet.

        Args:
            trainer: What learns.
            checkpoints: Where the state before an update is, if it was saved.
            timeout_s: An update that takes longer is taken for hung.
            stop_within_s: How long an update may go on once the process is to stop.
            die: Ends the process, with the reason.
        """
        self.trainer, self._checkpoints = trainer, checkpoints
        self._timeout_s, self._stop_within_s, self._die = timeout_s, stop_within_s, die

    @property
    def step(self) -> int:
        """Updates behind the weights."""
        return self.trainer.step

    @property
    def average(self) -> WeightAverage | None:
        """Of the weights; None where there is none, or it is over no update yet."""
        average = self.trainer.average
        return average if average is not None and average.updates else None

    def state(self) -> TrainerState:
        """What a checkpoint holds."""
        return self.trainer.state()

    def load(self, state: TrainerState) -> None:
        """Goes on from a checkpoint's state."""
        self.trainer.load_state(state)

    def restart(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Goes on from a published version's weights, with a fresh optimizer."""
        self.trainer.restart(weights, step=step)

    async def update(
        self,
        examples: Sequence[Any],
        *,
        version: VersionId,
        saved: tuple[int, int] | None,
        stopping: asyncio.Event,
    ) -> Metrics:
        """One update.

        Args:
            examples: The batch.
            version: Of the weights before it.
            saved: Fence and update of the checkpoint that holds the present state; None makes a copy of it first.
            stopping: Set when the process is to stop: an update that would take too long then is undone.

        Raises:
            BadBatch: It cannot be applied, or failed by any other error; the state is the one before.
            Interrupted: It was stopped; the state is the one before.
            DataLoss: It failed, and the checkpoint with the state before is damaged.
        """
        before = None if saved is not None else await asyncio.to_thread(lambda: self.trainer.state().cloned())
        interrupt = threading.Event()
        try:
            return await self._run(examples, version, interrupt, stopping)
        except (BadBatch, Interrupted):
            await asyncio.to_thread(self._restore, before, saved)
            raise
        finally:
            interrupt.set()  # cancelled: the thread must not go on for long

    async def _run(
        self, examples: Sequence[Any], version: VersionId, interrupt: threading.Event, stopping: asyncio.Event
    ) -> Metrics:
        def work() -> Metrics:
            try:
                return self.trainer.update(examples, version=version, interrupted=interrupt.is_set)
            except (BadBatch, Interrupted):
                raise
            except Exception as error:
                logger.exception("an update failed by an error of its own")
                failure = f"the update failed: {type(error).__name__}: {error}"
            raise BadBatch(failure)  # out here, so that it holds on to no tensor of the failed update

        update = asyncio.ensure_future(asyncio.to_thread(work))
        stop = asyncio.ensure_future(stopping.wait())
        try:
            done, _ = await asyncio.wait({update, stop}, timeout=self._timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if stop in done and not update.done():
                await asyncio.wait({update}, timeout=self._stop_within_s)
            if not update.done():
                interrupt.set()
                await asyncio.wait({update}, timeout=min(_LAST_PASS_S, self._timeout_s))
            if not update.done():
                self._die(
                    f"an update has not ended within {self._timeout_s:g} s (learner.update_timeout_s), nor when asked to: "
                    "the process ends, and its successor goes on from the last checkpoint"
                )
            if not done and isinstance(update.exception(), Interrupted):
                self._die(
                    f"an update took longer than {self._timeout_s:g} s (learner.update_timeout_s): raise that, or lower "
                    "learner.batch; the process ends, and its successor goes on from the last checkpoint"
                )
            return update.result()
        finally:
            stop.cancel()

    def _restore(self, before: TrainerState | None, saved: tuple[int, int] | None) -> None:
        if before is None:
            assert saved is not None
            found = self._checkpoints.find(lambda name: (name.fence, name.step) == saved)
            if found is None:
                raise DataLoss(f"the checkpoint of update {saved[1]} is damaged or gone; start anew from an older one")
            before = found.trainer
        self.trainer.load_state(before)
