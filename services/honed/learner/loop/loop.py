"""The learner's loop: collect, update, make durable, acknowledge, publish.

The order carries the promises. A batch is acknowledged only after the checkpoint that contains its effect is durable, and
that checkpoint knows every rollout behind its weights: so a rollout that comes again is recognised, and trains once (P2). A
version is published after its update's checkpoint, if the update has one; an update without one is made again, bit for bit,
from rollouts that are not yet acknowledged (P6). Everything is done under a fenced lease.

Nothing that happens to a batch, a version, a disk or Redis ends the process: a batch that cannot be applied is skipped, a
version that generators refuse is left, a full disk and an absent Redis are waited for, and where nothing helps training stops
with an alarm while the process goes on answering.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from honed.artifacts.version import VersionId
from honed.kit.errors import HonedError
from honed.kit.tracing import Span
from honed.learner.loop.retry import Retry, Stopped, is_passing
from honed.learner.loop.rollback import Destination, History
from honed.learner.loop.run_state import RunState
from honed.learner.loop.setbacks import OnRefused, Setbacks
from honed.learner.loop.spans import train_spans, update_span
from honed.learner.sources.source import BrokenPolicy, InHand
from honed.learner.train.trainer import BadBatch, Interrupted
from honed.v1 import learner_pb2

logger = logging.getLogger(__name__)

_PUSH_PATIENCE_S: Final = 5.0


@dataclass(frozen=True)
class LoopSettings:
    """How the loop goes.

    Attributes:
        batch: Rollouts of an update.
        steps: Updates of the run; None for no end.
        checkpoint_every: Updates between checkpoints.
        max_staleness: Versions.
        overlap_push: Train on while a version is brought in. Where learner and generator share cores, waiting for the push
            keeps the generator's pause short.
        on_refused: What follows when generators refuse a version.
        failures: Batches that cannot be applied, or versions that are refused, in a row before a roll-back; and after that,
            before training stops.
    """

    batch: int
    steps: int | None = None
    checkpoint_every: int = 1
    max_staleness: int = 2
    overlap_push: bool = True
    on_refused: OnRefused = "rollback"
    failures: int = 3


class TrainingLoop:
    """One learner at work on one run."""

    def __init__(
        self,
        run: RunState,
        history: History,
        settings: LoopSettings,
        stopping: asyncio.Event,
        *,
        paused: bool = False,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Does nothing yet.

        Args:
            run: The state of the run, loaded.
            history: Where it can go back to.
            settings: How the loop goes.
            stopping: Ends the loop once it is set.
            paused: Begin paused.
            sleep: Between tries.
        """
        self._run, self._settings, self._stopping = run, settings, stopping
        self._status = run.status
        self._retry = Retry(run.status, stopping, sleep)
        self._weights = asyncio.Lock()
        """Held while the state of the run changes."""
        self._changed = asyncio.Event()
        run.release.changed = self._changed.set
        self._paused = paused
        self._setbacks = Setbacks(
            run,
            history,
            self._retry,
            limit=settings.failures,
            on_refused=settings.on_refused,
            max_staleness=settings.max_staleness,
        )

    async def run(self) -> None:
        """Trains until it is to stop. After the updates of the run it drops what still comes.

        Raises:
            LeaseLost: Another learner has taken over.
            DataLoss: The state before a failed update can be had from nowhere.
        """
        try:
            await self._run.reporter.write()
            async with self._weights:
                await self._retry.run("publish", lambda: self._run.start_release(finished=self._is_finished))
            while not self._stopping.is_set():
                await self._next()
        except Stopped:
            return  # the successor does it, from the last checkpoint
        finally:
            await self._run.release.stop(_PUSH_PATIENCE_S)
        async with self._weights:
            if self._run.unsaved and self._run.release.refused is None:
                await self._save_last()
        await self._run.intake.release()

    async def checkpoint(self) -> int:
        """Writes a checkpoint after the update in hand, if there is anything new; returns its update.

        Raises:
            Overloaded: The disk is full.
        """
        async with self._weights:
            await self._run.save()
            return self._run.training.step

    def pause(self) -> None:
        """Stops after the update in hand."""
        self._paused = True
        self._changed.set()

    def resume(self) -> None:
        """Goes on, after training had failed too."""
        self._paused = False
        self._setbacks.resume()
        self._changed.set()

    async def roll_back(self, find: Callable[[], Destination]) -> tuple[VersionId, bool]:
        """Goes back after the update in hand; returns the new version, and whether optimizer and all else went back too.

        Args:
            find: Looks up where to, in a thread.

        Raises:
            NotFound: There is no such point.
            Unavailable: The learner stops.
        """
        async with self._weights:
            destination = await self._status.pulse.in_thread(find)
            await self._retry.run("roll-back", lambda: self._run.go_back(destination))
            self._setbacks.forget()
            self._changed.set()
            return self._status.version, destination.checkpoint is not None

    async def _next(self) -> None:
        """Does the one thing that is due."""
        self._changed.clear()
        self._run.release.check()
        if self._run.release.refused is not None:
            async with self._weights:
                if self._run.release.refused is not None:
                    await self._setbacks.answer_refusal(self._run.release.refused)
        elif self._setbacks.stopped:
            await self._retry.idle(learner_pb2.LEARNER_STATE_FAILED, self._changed.wait())
            if not self._setbacks.stopped:
                async with self._weights:
                    await self._retry.run("publish", lambda: self._run.start_release(finished=self._is_finished))
        elif self._paused:
            await self._retry.idle(learner_pb2.LEARNER_STATE_PAUSED, self._changed.wait())
        elif self._is_finished:
            await self._finish()
        else:
            await self._turn()

    @property
    def _is_finished(self) -> bool:
        """Whether the updates of the run are made."""
        return self._settings.steps is not None and self._run.training.step >= self._settings.steps

    async def _turn(self) -> None:
        """One batch, unless something else comes first."""
        self._status.state = learner_pb2.LEARNER_STATE_WAITING
        rollbacks, started = self._run.rollbacks, time.monotonic()
        try:
            with self._status.waiting.working():
                held = await self._collect()
        except BrokenPolicy as error:
            async with self._weights:
                await self._setbacks.skip([], error, beyond=self._run.training.step)
            return
        if held is None:
            return
        self._status.waited_s, self._status.spare = time.monotonic() - started, self._run.intake.waiting
        if not self._settings.overlap_push:
            await self._run.release.settle()
        async with self._weights:
            # A roll-back came between, or is due: for the weights that then are, the batch is judged anew.
            if rollbacks != self._run.rollbacks or self._run.release.refused is not None:
                self._run.intake.put_back(held)
            else:
                with update_span(held, self._run.training.step + 1) as span:
                    await self._learn(held, span)

    async def _collect(self) -> Sequence[InHand] | None:
        """Waits for a batch; None if something has changed before there was one."""
        collecting = asyncio.ensure_future(self._run.intake.collect(self._settings.batch, self._run.training.step))
        others = [asyncio.ensure_future(event.wait()) for event in (self._stopping, self._changed)]
        try:
            await asyncio.wait({collecting, *others}, return_when=asyncio.FIRST_COMPLETED)
            return await collecting if collecting.done() else None
        finally:
            left = not collecting.done()
            for task in (collecting, *others):
                task.cancel()
            await asyncio.wait({collecting, *others})
            if left and not collecting.cancelled() and collecting.exception() is None:
                self._run.intake.put_back(collecting.result())  # it came just then

    async def _learn(self, held: Sequence[InHand], span: Span) -> None:
        run, status = self._run, self._status
        status.state = learner_pb2.LEARNER_STATE_TRAINING
        before, staleness = status.version, [each.staleness(run.training.step) for each in held]
        try:
            with status.busy.working(), status.pulse.working(), train_spans(held, run.training.step):
                figures = await run.training.update(
                    [each.example for each in held], version=before, saved=run.saved, stopping=self._stopping
                )
        except Interrupted as error:
            span.fail(error)
            run.intake.put_back(held)
            return
        except BadBatch as error:
            span.fail(error)
            await self._setbacks.skip(held, error)
            return
        self._setbacks.applied()
        run.learned(held)
        status.update_s = figures["seconds"]
        told = {"honed.kl": figures.get("kl"), "honed.score": figures.get("score_mean")}
        span.set({"honed.version": status.version.label, **{name: value for name, value in told.items() if value is not None}})
        await run.release.settle()
        if run.release.refused is not None and self._settings.on_refused == "rollback":
            return  # the update goes with the refused weights that it started from
        if status.served == before and (run.rolled_to is None or before.step > run.rolled_to):
            self._setbacks.served()
        await self._retry.run("journal", lambda: run.record(figures, held, staleness))
        run.tell()
        await run.reporter.write()
        if run.training.step % self._settings.checkpoint_every == 0:
            await self._retry.run("checkpoint", run.save)
        await self._retry.run("publish", lambda: run.publish(held))
        await run.journal.announce()

    async def _finish(self) -> None:
        """The updates are done: all is made durable and brought in, and what still comes is dropped."""
        if not self._status.finished:
            await self._run.release.settle()
            if self._run.release.refused is not None:
                return
            async with self._weights:
                if not self._is_finished:
                    return  # a roll-back has come between
                await self._retry.run("checkpoint", self._run.save)
                if self._run.average_is_due:
                    await self._retry.run("publish", self._run.publish_average)
                    return  # comes here again, and waits for the push
                self._status.state, self._status.finished = learner_pb2.LEARNER_STATE_FINISHED, True
                await self._run.reporter.write()
        await self._retry.idle(learner_pb2.LEARNER_STATE_FINISHED, self._run.intake.receive())
        async with self._weights:
            # What is received here may have been admitted for a roll-back that has just been made: then it trains.
            if self._status.finished:
                await self._retry.idle(learner_pb2.LEARNER_STATE_FINISHED, self._run.intake.discard("run_finished"))

    async def _save_last(self) -> None:
        try:
            await self._run.save()
        except (HonedError, OSError) as error:
            if not is_passing(error):
                raise
            logger.warning("not saved; the updates are made again", extra={"reason": str(error)})
