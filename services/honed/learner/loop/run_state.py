"""The state of a run as one whole: weights, rollouts behind them, checkpoint, journal, and published version.

Whatever changes one of them changes the others here, in an order that a crash at any point leaves consistent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from honed.artifacts.version import VersionId
from honed.kit.errors import DataLoss, NotFound
from honed.learner import metrics
from honed.learner.loop.checkpoint import CheckpointStore
from honed.learner.loop.checkpoint_files import Checkpoint
from honed.learner.loop.journal import Journal
from honed.learner.loop.records import UpdateRecord
from honed.learner.loop.release import BASE, Release
from honed.learner.loop.rollback import Destination, good_versions
from honed.learner.loop.training import Training
from honed.learner.sources.source import InHand, Source
from honed.learner.status import LearnerStatus, Reporter
from honed.learner.train.trainer import Metrics
from honed.queue.lease import HeldLease
from honed.v1 import learner_pb2

logger = logging.getLogger(__name__)

_ROLLBACKS_KEPT: Final = 64
SAMPLER_GAP_ALARM: Final = 1.05
"""Mean exp|difference| between sampler and learner on the same weights above which one of the two computes something else."""


class RunState:
    """What a learner has learned, and where it is written down. One caller at a time."""

    def __init__(
        self,
        training: Training,
        intake: Source,
        checkpoints: CheckpointStore,
        journal: Journal,
        release: Release,
        lease: HeldLease,
        status: LearnerStatus,
        reporter: Reporter,
        clock: Callable[[], float],
    ) -> None:
        """Reads nothing yet.

        Args:
            training: What learns.
            intake: Where batches come from.
            checkpoints: Where the state is kept.
            journal: What was done.
            release: Publishes and pushes versions.
            lease: Held; checked before each durable write.
            status: Shows where the run is.
            reporter: Tells those who feed the learner.
            clock: Seconds since 1970, for the journal.
        """
        self.training, self.intake, self.journal, self.release = training, intake, journal, release
        self.lease, self.status, self.reporter = lease, status, reporter
        self._checkpoints, self._clock = checkpoints, clock
        self.unsaved: list[InHand] = []
        """Rollouts that have trained since the last checkpoint."""
        self.saved: tuple[int, int] | None = None
        """Fence and update of the checkpoint that holds exactly the present state."""
        self.averaged: VersionId | None = None
        """The version that is the average of the present state's weights, once it is published."""
        self.rolled_to: int | None = None
        """Update of the last roll-back of this process."""
        self.rollbacks = 0
        """Roll-backs of this process."""
        status.fence = lease.claim.fence
        release.committed = reporter.soon

    def load(self) -> None:
        """Loads the newest whole checkpoint, if there is one. Blocks.

        Raises:
            DataLoss: There are checkpoints, and none is whole.
            FailedPrecondition: They are of an earlier format.
        """
        skipped: list[str] = []
        found = self._checkpoints.latest(on_skip=lambda path, reason: skipped.append(f"{path.name}: {reason}"))
        if skipped:
            self.status.alarms["checkpoint"] = f"damaged checkpoints were passed over: {'; '.join(skipped)}"
        if found is not None:
            self._take_state(found)
            version = VersionId.parse(found.progress.version or BASE.label)
            self.status.version, self.saved = version, (version.fence, found.trainer.step)
            logger.info("resumed", extra={"step": found.trainer.step, "version": version.label})
        self.status.update = self.status.checkpoint_update = self.training.step

    async def take_over(self, predecessors: list[str]) -> None:
        """Takes up what earlier learners held, and cuts off what the journal has beyond the checkpoint.

        What was acknowledged beyond it and will not come again is counted as undone.

        Args:
            predecessors: Their consumer names.
        """
        await self.intake.take_over(predecessors)
        step = self.training.step
        self._cut_journal(step, *await asyncio.to_thread(self._after, step))

    def learned(self, held: Sequence[InHand]) -> None:
        """Takes a batch whose update has been applied into the state. It is not written down yet."""
        self.saved = self.averaged = None
        self.intake.learned(held)
        self.unsaved += held
        self.status.version = VersionId(self.lease.claim.fence, self.training.step)

    async def rename(self) -> None:
        """Gives the same weights a version of a new fence."""
        self.status.fence = (await self.lease.raise_fence()).fence
        self.status.version, self.saved = VersionId(self.lease.claim.fence, self.training.step), None

    async def skip(self, held: Sequence[InHand], reason: str) -> None:
        """Writes down that a batch was not applied."""
        ids = [each.rollout_id for each in held]
        self.journal.add_skipped(self.training.step, self._clock(), ids, reason)

    async def save(self) -> None:
        """Writes a checkpoint of the present state, and acknowledges what it makes durable."""
        version = self.status.version
        if self.saved is None:
            await self.lease.check()
            averaged = "" if self.averaged is None else self.averaged.label
            progress = replace(self.intake.progress(version.label), averaged=averaged)
            checkpoint = Checkpoint(self.training.state(), progress)

            def write() -> None:
                good = good_versions(self.release.store, self.journal)
                self._checkpoints.save(checkpoint, version.fence, also_keep=self.release.promoted(), good=good)

            await self.status.pulse.in_thread(write)
            self.saved = (version.fence, self.training.step)
            self.status.alarms.pop("checkpoint", None)
        durable, self.unsaved = self.unsaved, []
        self.status.checkpoint_update = self.training.step
        self.tell()
        if durable:
            await self.reporter.write()  # before the entries go: a stale report admits less, never more
            await self.intake.acknowledge(durable)

    async def publish(self, held: Sequence[InHand]) -> None:
        """Publishes the weights as they are now, and pushes them while the next batch is collected and trained."""
        manifest = await self.release.publish(self.status.version, held)
        await self.release.push(manifest)

    @property
    def average_is_due(self) -> bool:
        """Whether the average of the present weights has yet to be published."""
        return self.training.average is not None and self.averaged is None

    async def publish_average(self) -> None:
        """Publishes and pushes the average of the weights, under a fence of its own: the weights of this update have theirs.

        They stay what a checkpoint holds and training goes on from. Repeated after a failure half-way, it completes.
        """
        self.status.fence = fence = (await self.lease.raise_fence()).fence
        version = VersionId(fence, self.training.step)
        manifest = await self.release.publish(version, [], average=self.training.average)
        self.averaged, self.saved = version, None
        await self.save()
        await self.release.push(manifest)

    async def start_release(self, *, finished: bool = False) -> None:
        """Brings the present weights in, or publishes them first if the newest version is another.

        Args:
            finished: Whether the updates are done: then the average of the weights is what is brought in, if it stands already.
        """
        store = self.release.store
        in_thread = self.status.pulse.in_thread
        servable = await in_thread(store.servable)
        if servable and servable[0] in (self.status.version, self.averaged if finished else None):
            version = servable[0]
            if version == BASE:
                return  # generators start from it
            try:
                # Its publisher may have died before any generator had it, and no fresher rollout would ever come.
                manifest = await in_thread(lambda: store.manifest(version))
            except (DataLoss, NotFound) as error:
                logger.warning("published again: the version in the store is damaged", extra={"reason": str(error)})
            else:
                await self.release.push(manifest)
                return
        self.averaged = None
        self.status.version = VersionId(self.lease.claim.fence, self.training.step)
        if self.status.version in await in_thread(lambda: store.marks.all("quarantined")):
            await self.rename()  # generators never take it again under the name that they refused
        await self.publish([])

    async def go_back(self, destination: Destination, *, publish: bool = True) -> None:
        """Goes on from another point under a new fence. Repeated after a failure half-way, it completes."""
        await self.release.stop()
        self.status.fence = fence = (await self.lease.raise_fence()).fence
        step, unsaved = destination.step, self.unsaved
        self.intake.put_back(unsaved)
        self.unsaved = []
        rollbacks = (*self.intake.rollbacks, (fence, step))[-_ROLLBACKS_KEPT:]
        if destination.checkpoint is not None:
            checkpoint = destination.checkpoint
            await self.status.pulse.in_thread(lambda: self._take_state(checkpoint))
        else:
            assert destination.weights is not None
            self.training.restart(destination.weights, step)
            self.intake.forget(each.rollout_id for each in unsaved)
        forget = destination.checkpoint is None
        after = await self.status.pulse.in_thread(lambda: self._after(step, forget=forget))
        self.intake.rollbacks = rollbacks
        self.rollbacks, self.rolled_to = self.rollbacks + 1, step
        self.release.forget_refusals()
        self.averaged = None
        self.status.version, self.saved, self.status.finished = VersionId(fence, step), None, False
        if self.status.state == learner_pb2.LEARNER_STATE_FINISHED:
            # At once: a conductor that still reads "finished" after the roll-back would feed nothing, for ever.
            self.status.state = learner_pb2.LEARNER_STATE_WAITING
        await self.save()
        self._cut_journal(step, *after)
        await self.reporter.write()
        if publish:
            await self.publish([])

    async def record(self, figures: Metrics, held: Sequence[InHand], staleness: Sequence[int]) -> None:
        """Writes an update down, with its metrics."""
        values = {
            **figures,
            "staleness_max": float(max(staleness)),
            "staleness_mean": sum(staleness) / len(staleness),
            "waited_seconds": self.status.waited_s,
            "spare_rollouts": float(self.status.spare),
            "busy_seconds": self.status.busy.seconds,
            "wait_seconds": self.status.waiting.seconds,
        }
        gap = figures.get("sampler_gap_same_weights")
        if gap is not None and gap > SAMPLER_GAP_ALARM:
            alarm = f"sampler and learner disagree on the same weights: mean exp gap {gap:.3g}, above {SAMPLER_GAP_ALARM}"
            logger.error(alarm)
            self.status.alarms["sampler"] = alarm
        elif gap is not None:
            self.status.alarms.pop("sampler", None)
        ids = [each.rollout_id for each in held]
        record = UpdateRecord(self.training.step, self._clock(), values, ids)
        self.journal.add_update(record, self.intake.trained.turn)
        metrics.updated(values)
        logger.info("update", extra={"step": self.training.step, "score": figures.get("score_mean"), "kl": figures.get("kl")})

    def tell(self) -> None:
        """Brings the status up to date."""
        self.status.update = self.training.step
        self.status.unsaved = len(self.unsaved)
        totals = self.journal.totals
        self.status.turn, self.status.undone = max(self.intake.trained.turn, totals.turn), totals.undone

    def _after(self, step: int, *, forget: bool = False) -> tuple[int, int]:
        """Counts the rollouts of the updates after one, and those of them that will not come again. Blocks.

        Args:
            step: The last update that stays.
            forget: Whether the source is to forget that they trained.
        """
        gone = undone = 0
        for record in self.journal.read(step + 1, with_rollouts=True):
            gone += len(record.rollout_ids)
            undone += sum(not self.intake.holds(rollout) for rollout in record.rollout_ids)
            if forget:
                self.intake.forget(record.rollout_ids)
        return gone, undone

    def _cut_journal(self, step: int, gone: int, undone: int) -> None:
        if undone:
            logger.warning("training was undone", extra={"rollouts": undone, "back_to": step})
        self.journal.cut(step, gone, undone)
        self.tell()

    def _take_state(self, checkpoint: Checkpoint) -> None:
        self.training.load(checkpoint.trainer)
        self.intake.restore(checkpoint.progress)
        self.averaged = VersionId.parse(checkpoint.progress.averaged) if checkpoint.progress.averaged else None
