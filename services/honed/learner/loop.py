"""The learner's loop: collect, update, make durable, acknowledge, publish.

The order carries the promises. A batch is acknowledged only after the checkpoint that contains its effect is durable, and that
checkpoint names the batch's rollouts: so a rollout that comes again is recognised, and trains once (P2). A version is published
after its step's checkpoint, if the step has one; a step without one is made again, bit for bit, from rollouts that are not yet
acknowledged (P6). Everything is done under a fenced lease.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from honed.artifacts.manifest import Lineage, Manifest
from honed.artifacts.store import VersionDraft
from honed.artifacts.version import VersionId
from honed.kit.aio import unless
from honed.kit.busy import BusyTime
from honed.kit.errors import Unavailable
from honed.learner.checkpoint import Checkpoint, CheckpointStore, Progress
from honed.learner.exporter import Exporter
from honed.learner.intake import Held, Intake
from honed.learner.ledger import Ledger, PushRecord, StepRecord
from honed.learner.publisher import Publisher
from honed.learner.stats import SAMPLER_GAP_ALARM, UpdateStats
from honed.learner.update import PPOTrainer
from honed.v1 import learner_pb2

logger = logging.getLogger(__name__)

PUSH_RETRY_PAUSE_S = 1.0


@dataclass
class Status:
    """Where the loop stands; read by the service."""

    fence: int = 0
    state: learner_pb2.LearnerState.ValueType = learner_pb2.LEARNER_STATE_STARTING
    served: VersionId | None = None
    checkpoint_step: int = 0
    busy: BusyTime = field(default_factory=BusyTime)


@dataclass(frozen=True)
class LoopSettings:
    """What the loop is told.

    Attributes:
        batch: rollouts of an update.
        steps: updates of the run.
        checkpoint_every: updates between checkpoints.
        push_retry_s: how long a push is tried again while a generator is down.
        config_hash: digest of the settings, for the lineage of versions.
        preference_snapshot: content hash of the judgements behind the reward model, for the lineage; empty if unknown.
        overlap_push: train on while a version is brought in. Where learner and generator share cores, waiting for the push
            keeps the generator's pause short.
    """

    batch: int
    steps: int
    checkpoint_every: int
    push_retry_s: float
    config_hash: str
    preference_snapshot: str = ""
    overlap_push: bool = True


class TrainingLoop:
    """One learner at work on one run."""

    def __init__(
        self,
        trainer: PPOTrainer,
        intake: Intake,
        checkpoints: CheckpointStore,
        ledger: Ledger,
        exporter: Exporter,
        publisher: Publisher,
        settings: LoopSettings,
        status: Status,
        check_lease: Callable[[], Awaitable[None]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Takes the parts.

        Args:
            trainer: what learns.
            intake: where rollouts come from.
            checkpoints: where the state is kept.
            ledger: the books.
            exporter: makes a directory of the weights.
            publisher: brings it into the generators.
            settings: what the loop is told.
            status: what the service shows; its fence is the lease's.
            check_lease: raises LeaseLost once another learner has taken over.
            clock: seconds since 1970, for the books.
        """
        self.trainer, self.status, self.ledger = trainer, status, ledger
        self._intake, self._checkpoints = intake, checkpoints
        self._exporter, self._publisher = exporter, publisher
        self._settings, self._check_lease, self._clock = settings, check_lease, clock
        self._consumed: list[str] = []
        self._unsaved: list[Held] = []
        self._position = "0-0"
        self._pushing: asyncio.Task[None] | None = None
        self.unpaused = asyncio.Event()
        self.unpaused.set()
        self._weights = asyncio.Lock()

    def resume(self) -> Progress:
        """Loads the newest whole checkpoint, if there is one, and brings the book in line with it.

        Raises:
            DataLoss: there are checkpoints, and none is whole.
        """
        found = self._checkpoints.latest()
        progress = Progress() if found is None else found.progress
        if found is not None:
            self.trainer.load_state(found.trainer)
            logger.info("resumed", extra={"step": found.trainer.step})
        self.ledger.rewind(self.trainer.step)
        self._consumed = list(progress.consumed)
        self._position = progress.stream_position
        self.status.checkpoint_step = self.trainer.step
        return progress

    async def run(self, stopping: asyncio.Event, newest: VersionId | None) -> None:
        """Trains until the steps of the run are done, then drops what still comes, until `stopping` is set.

        Args:
            stopping: ends the loop after the update in hand.
            newest: the newest version in the store, to tell whether this learner's weights are published.

        Raises:
            LeaseLost: another learner took over.
            Unavailable: Redis is gone for good.
        """
        if newest is None or newest.step != self.trainer.step:
            await self._publish([])
        elif newest.step:
            # Its publisher may have died before any generator had it, and no fresher rollout would ever come.
            self._pushing = asyncio.create_task(self._bring_in(await self._publisher.published(newest)))
        while self.trainer.step < self._settings.steps and not stopping.is_set():
            if not self.unpaused.is_set():
                self.status.state = learner_pb2.LEARNER_STATE_PAUSED
                await unless(stopping, self.unpaused.wait())
                continue
            self.status.state = learner_pb2.LEARNER_STATE_WAITING
            held = await unless(stopping, self._collect())
            if not self._settings.overlap_push:
                await self._pushed()
            if held is not None:
                async with self._weights:
                    await self._learn(held)
        await self._pushed()
        if self._unsaved:
            await self.save()
        if not stopping.is_set():
            self.status.state = learner_pb2.LEARNER_STATE_FINISHED
        while not stopping.is_set():
            await self._intake.discard("run_finished")
        await self._intake.release()

    async def save(self) -> int:
        """Writes a checkpoint and acknowledges what it makes durable; returns its step."""
        await self._check_lease()
        # The batches of the checkpoint before are named too: their acknowledgement may have been lost.
        progress = Progress(stream_position=self._position, consumed=tuple(self._consumed))
        checkpoint = Checkpoint(self.trainer.state(), progress)
        await asyncio.to_thread(self._checkpoints.save, checkpoint)
        self.status.checkpoint_step = self.trainer.step
        await self._intake.acknowledge(self._unsaved)
        self._consumed = [held.episode.rollout_id for held in self._unsaved]
        self._unsaved = []
        return self.trainer.step

    async def save_now(self) -> int:
        """As `save`, after the update in hand, if there is one."""
        async with self._weights:
            return await self.save()

    async def _collect(self) -> list[Held]:
        """Waits for a batch. A push that fails for good ends the wait: without it there may never be a fresh batch."""
        collecting = asyncio.ensure_future(self._intake.collect(self._settings.batch, self.trainer.step))
        try:
            if self._pushing is not None:
                await asyncio.wait({collecting, self._pushing}, return_when=asyncio.FIRST_COMPLETED)
                if self._pushing.done():
                    await self._pushed()
            return await collecting
        finally:
            if not collecting.done():
                collecting.cancel()
                await asyncio.wait([collecting])

    async def _learn(self, held: list[Held]) -> None:
        self.status.state = learner_pb2.LEARNER_STATE_TRAINING
        before = VersionId(self.status.fence, self.trainer.step)
        staleness = [each.staleness(before.step) for each in held]
        with self.status.busy.working():
            stats = await asyncio.to_thread(self.trainer.update, [each.episode for each in held], version=before)
        self._unsaved += held
        self._consumed += [each.episode.rollout_id for each in held]
        self._position = held[-1].delivery.entry
        await self._pushed()
        self._record(stats, held, staleness)
        if self.trainer.step % self._settings.checkpoint_every == 0:
            await self.save()
        await self._publish(held)
        await self.ledger.announce()

    def _record(self, stats: UpdateStats, held: list[Held], staleness: list[int]) -> None:
        values = {
            **stats.as_metrics(),
            "staleness_max": float(max(staleness)),
            "staleness_mean": sum(staleness) / len(staleness),
            "busy_seconds": self.status.busy.seconds,
        }
        if stats.sampler_alarm:
            logger.error(
                "sampler and learner disagree on the same weights",
                extra={"mean_exp_gap": stats.sampler_gap_same_weights, "alarm_above": SAMPLER_GAP_ALARM},
            )
        ids = [each.episode.rollout_id for each in held]
        self.ledger.add_step(StepRecord(self.trainer.step, self._clock(), values, ids))
        logger.info("step", extra={"step": self.trainer.step, "score": stats.score_mean, "kl": stats.kl})

    async def _publish(self, held: list[Held]) -> None:
        """Exports the weights as they are now, and pushes them while the next batch is collected and trained."""
        version = VersionId(self.status.fence, self.trainer.step)
        directory, canaries = await asyncio.to_thread(self._exporter.export, version)
        lineage = Lineage(
            parent="" if self.status.served is None else self.status.served.label,
            config_hash=self._settings.config_hash,
            preference_snapshot=self._settings.preference_snapshot,
            reward_model_version=held[-1].reward_model_version if held else "",
            first_entry=held[0].delivery.entry if held else "",
            last_entry=held[-1].delivery.entry if held else "",
            created_at=datetime.fromtimestamp(self._clock(), tz=UTC).isoformat(),
        )
        self._pushing = asyncio.create_task(self._push(directory, VersionDraft(version, canaries, lineage)))

    async def _push(self, directory: Path, draft: VersionDraft) -> None:
        """Publishes a version and brings it in."""
        await self._bring_in(await self._publisher.publish(directory, draft))

    async def _bring_in(self, manifest: Manifest) -> None:
        """Brings a version in, trying again while a generator is down: without it no fresh rollout comes."""
        end = time.monotonic() + self._settings.push_retry_s
        while True:
            report = await self._publisher.bring_in(manifest)
            fields = {name: value for name, value in asdict(report).items() if name != "version"}
            record = PushRecord(version=report.version.label, ended_at=self._clock(), **fields)
            if not self.ledger.has_pushed(record.version):
                self.ledger.add_push(record)
            if record.succeeded:
                self.status.served = report.version
                return
            if time.monotonic() > end:
                raise Unavailable(
                    f"version {report.version} could not be brought into every generator within "
                    f"{self._settings.push_retry_s:g} s: {'; '.join(report.failures)}"
                )
            await asyncio.sleep(PUSH_RETRY_PAUSE_S)

    async def _pushed(self) -> None:
        """Waits for the push under way: versions are committed in order, one at a time."""
        if self._pushing is not None:
            pushing, self._pushing = self._pushing, None
            await pushing
