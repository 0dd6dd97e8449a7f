"""The learner process: locks its directory, takes the lease, resumes, trains, and answers LearnerService."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import shutil
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import torch
from redis.exceptions import ResponseError

from honed.artifacts.promotions import PromotionRecord
from honed.artifacts.reward_models import TRAINED, RewardModelStore
from honed.artifacts.store import PolicyStore
from honed.config import RunSettings
from honed.kit.address import host_port
from honed.kit.errors import FailedPrecondition, HonedError, NotFound
from honed.kit.server import Listener, Server, Servicer, serve_until_signalled
from honed.learner.build import build_trainer, config_hash, vocabulary_of
from honed.learner.critic_start import choose_critic_start
from honed.learner.loop.checkpoint import CheckpointStore
from honed.learner.loop.directory_lock import locked
from honed.learner.loop.exporter import Exporter
from honed.learner.loop.journal import Journal
from honed.learner.loop.loop import LoopSettings, TrainingLoop
from honed.learner.loop.pause import PauseFile
from honed.learner.loop.push import Pusher, RegisteredGenerators
from honed.learner.loop.release import BASE, Release
from honed.learner.loop.rollback import History, Weights
from honed.learner.loop.run_state import RunState
from honed.learner.loop.training import Training
from honed.learner.models.policy import PolicyModel
from honed.learner.service import LearnerService, LoadedLearner
from honed.learner.sources.choose import opened
from honed.learner.sources.preferences import PreferenceExamples
from honed.learner.status import AnnouncedPromotions, LearnerStatus, Reporter
from honed.learner.train.trainer import Trainer
from honed.models.loader import load_language_model
from honed.queue.connection import RedisLink, RetryPolicy
from honed.queue.identity import RunIdentity
from honed.queue.keys import SCORED, RunKeys
from honed.queue.lease import HeldLease, Leases
from honed.queue.members import GENERATION, Members
from honed.queue.progress import ProgressBoard
from honed.queue.promotions import PromotedScorers, PromotionBoard
from honed.queue.scripts import GROUP
from honed.queue.stream import DeliverySettings, WorkQueue
from honed.runtime import consumer_name, internal_channel, redis_link, server_options
from honed.v1 import learner_pb2_grpc
from honed.workspace import Workspace

logger = logging.getLogger(__name__)

SERVICE: Final = "honed.v1.LearnerService"
LEASE_MS: Final = 6_000
_WATCHES: Final = (f"/{SERVICE}/WatchMetrics", f"/{SERVICE}/WatchPushes")
_BEYOND_UPDATE_S: Final = 120.0
"""How much longer than an update anything in a thread may take: a hung update ends the process itself, with its reason."""
_CONSUMER: Final = re.compile(r"learner-(\d+)")


async def run(settings: RunSettings) -> None:
    """Serves until SIGTERM.

    Raises:
        FailedPrecondition: There is no base version, or another learner holds the run or its directory.
        LeaseLost: Another learner took over.
    """
    section = settings.learner
    status = LearnerStatus()
    loaded: asyncio.Future[LoadedLearner] = asyncio.get_running_loop().create_future()
    service = LearnerService(settings.run, section.steps, status, loaded)
    servicer = Servicer(SERVICE, learner_pb2_grpc.add_LearnerServiceServicer_to_server, service)
    server = Server([Listener(section.host, section.port, [servicer])], server_options(settings, section, _WATCHES))
    status.pulse = server.health.pulse("training", section.update_timeout_s + _BEYOND_UPDATE_S, idle=True)

    async def work(stopping: asyncio.Event) -> None:
        # A run outlives any outage of Redis: what waits for it waits.
        async with redis_link(settings, RetryPolicy(math.inf)) as link:
            learner = LearnerProcess(settings, link, status, stopping)
            try:
                async with locked(learner.home), learner.leased() as lease, learner.loaded(lease) as found:
                    loaded.set_result(found)
                    await server.ready()
                    await found.loop.run()
            finally:
                loaded.cancel()  # streams that still wait for it end

    await serve_until_signalled(server, work)


class LearnerProcess:
    """Builds a learner out of its settings, and takes it apart again."""

    def __init__(self, settings: RunSettings, link: RedisLink, status: LearnerStatus, stopping: asyncio.Event) -> None:
        """Reads and writes nothing yet.

        Args:
            settings: Of the run.
            link: To Redis.
            status: Where the learner writes how it stands.
            stopping: Ends the training.
        """
        self._settings, self._link, self._status, self._stopping = settings, link, status, stopping
        self._keys = RunKeys(settings.run)
        self._store = PolicyStore(settings.policy_url, settings.run)
        self._base_digest = ""
        self.home = Workspace(settings.directory).learner
        self._checkpoints = CheckpointStore(self.home / "checkpoints", keep=settings.learner.keep_checkpoints)

    @asynccontextmanager
    async def leased(self) -> AsyncIterator[HeldLease]:
        """Holds the run's lease, with a fence above all that learners have written.

        Raises:
            FailedPrecondition: Another learner holds it, or another run of this name stands in Redis.
            NotFound: There is no base version.
        """
        try:
            base = await asyncio.to_thread(self._store.manifest, BASE)
        except NotFound as error:
            raise NotFound(f"{error}: `honed job pretrain` publishes the base version; the learner starts from it") from error
        self._base_digest = base.digest
        await self._identify()
        newest = await asyncio.to_thread(self._store.latest)
        above = max(newest.fence if newest else 0, self._checkpoints.newest_fence())
        leases = Leases(self._link, self._keys)
        async with leases.held("learner", consumer_name("learner"), LEASE_MS, above) as lease:
            self._status.fence = lease.claim.fence
            yield lease

    @asynccontextmanager
    async def loaded(self, lease: HeldLease) -> AsyncIterator[LoadedLearner]:
        """A learner that has resumed; its parts end with the block.

        Raises:
            DataLoss: There are checkpoints, and none is whole; or the journal is damaged.
        """
        settings, home, section = self._settings, self.home, self._settings.learner
        await asyncio.to_thread(self._remove_leftovers, lease.claim.fence)
        # The base version 0.0 is where training starts, and the reference of the KL penalty.
        base = await asyncio.to_thread(self._store.fetch, BASE, home / "base")
        trainer = await asyncio.to_thread(self._trainer, base)
        journal = await asyncio.to_thread(lambda: Journal(home, most_mb=section.journal_mb))
        limits = DeliverySettings(int(settings.queue.lease_s * 1000), settings.queue.max_deliveries)
        queue = WorkQueue(self._link, self._keys, SCORED, f"learner-{lease.claim.fence}", limits)
        vocabulary = vocabulary_of(base, trainer.model.vocabulary_size)
        async with contextlib.AsyncExitStack() as stack:
            source = await stack.enter_async_context(opened(settings, queue, base, vocabulary, lambda: self._status.scorers))
            generators = self._generators()
            stack.push_async_callback(generators.close)
            snapshot = await asyncio.to_thread(_snapshot, settings)
            judgements = (lambda: source.snapshot) if isinstance(source, PreferenceExamples) else (lambda: snapshot)
            release = self._release(trainer, base, generators, journal, lease, judgements)
            training = Training(
                trainer, self._checkpoints, timeout_s=section.update_timeout_s, stop_within_s=section.drain_s / 2
            )
            reporter = self._reporter(queue)
            state = RunState(training, source, self._checkpoints, journal, release, lease, self._status, reporter, time.time)
            await asyncio.to_thread(state.load)
            await state.take_over(await self._predecessors(queue.consumer))
            await reporter.refresh()
            history = History(self._checkpoints, self._store, journal, home / "fetched", _load_weights)
            pause = PauseFile(home)
            loop = TrainingLoop(state, history, _loop_settings(settings, trainer), self._stopping, paused=bool(pause))
            await stack.enter_async_context(_beside(reporter, journal, self._stopping))
            yield LoadedLearner(loop, journal, history, pause)
        await queue.leave()

    def _trainer(self, base: Path) -> Trainer[Any, PolicyModel]:
        separate = self._settings.learner.critic == "separate"
        critic = choose_critic_start(self._settings, base, self.home) if separate else None
        return build_trainer(self._settings, base, critic)

    def _generators(self) -> RegisteredGenerators:
        section = self._settings.generation
        fallback = section.control_address or (host_port(section.host, section.control_port) if section.control_port else "")
        members = Members(self._link, self._keys, GENERATION)
        return RegisteredGenerators(members, lambda address: internal_channel(self._settings, address), fallback=fallback)

    def _release(
        self,
        trainer: Trainer[Any, PolicyModel],
        base: Path,
        generators: RegisteredGenerators,
        journal: Journal,
        lease: HeldLease,
        preference_snapshot: Callable[[], str],
    ) -> Release:
        settings = self._settings
        return Release(
            self._store,
            Exporter(trainer.model, base, self.home / "export", dtype=settings.generation.weights_dtype),
            Pusher(generators, timeout_s=settings.learner.push_timeout_s),
            journal,
            lease,
            self._status,
            keep=settings.policy.keep,
            config_hash=config_hash(settings),
            preference_snapshot=preference_snapshot,
            clock=time.time,
        )

    def _reporter(self, queue: WorkQueue) -> Reporter:
        async def dropped() -> Mapping[str, int]:
            stats = await queue.stats()
            return {**stats.dropped, **({"dead_letter": stats.dead} if stats.dead else {})}

        record = PromotionRecord(self._settings.policy_url, self._settings.run)
        sources = {scorer.name: scorer.source for scorer in self._settings.reward.scorers}
        scorers = PromotedScorers(PromotionBoard(self._link, self._keys), lambda: record.read().versions_for(sources))
        return Reporter(
            self._status,
            ProgressBoard(self._link, self._keys),
            samples=self._settings.conductor.samples_per_prompt,
            dropped=dropped,
            promotions=AnnouncedPromotions(scorers),
            identify=self._identify,
        )

    async def _identify(self) -> None:
        """Says in Redis whose run this is, also to a Redis that has forgotten."""
        await RunIdentity(self._link, self._keys).check(self._base_digest)

    async def _predecessors(self, own: str) -> list[str]:
        """Learners whose names the queue still knows, the oldest first: their processes are gone, the lease says so."""
        try:
            rows = await self._link.call(lambda: self._link.redis.xinfo_consumers(self._keys.stream(SCORED), GROUP))
        except (FailedPrecondition, ResponseError):  # no stream or no group yet
            return []
        names = [row["name"].decode() for row in rows]
        found = {name: int(match[1]) for name in names if (match := _CONSUMER.fullmatch(name)) and name != own}
        return sorted(found, key=found.__getitem__)

    def _remove_leftovers(self, fence: int) -> None:
        """Removes what killed learners left: exports, fetched versions, unfinished checkpoints."""
        for name in ("export", "fetched"):
            shutil.rmtree(self.home / name, ignore_errors=True)
        self._checkpoints.clean(fence)


@asynccontextmanager
async def _beside(reporter: Reporter, journal: Journal, stopping: asyncio.Event) -> AsyncIterator[None]:
    """Reports the progress, and ends the live streams when the process is to stop, which else would wait for them."""

    async def end_streams() -> None:
        await stopping.wait()
        await journal.close()

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(work) for work in (reporter.run(), end_streams())]
        yield
        for task in tasks:
            task.cancel()


def _loop_settings(settings: RunSettings, trainer: Trainer[Any, PolicyModel]) -> LoopSettings:
    section = settings.learner
    on_gpu = trainer.model.device.type != "cpu"
    return LoopSettings(
        batch=section.batch,
        steps=section.steps,
        checkpoint_every=section.checkpoint_every,
        max_staleness=section.max_staleness,
        overlap_push=on_gpu if section.overlap_push is None else section.overlap_push,
        on_refused=section.on_refused,
        failures=section.bad_batches,
    )


def _load_weights(directory: Path) -> Weights:
    """The language model's weights of a version's directory, on the host."""
    weights: Weights = load_language_model(directory, device=torch.device("cpu")).state_dict()
    return weights


def _snapshot(settings: RunSettings) -> str:
    """The judgements behind the run's newest reward model; empty if that is not known. Blocks."""
    store = RewardModelStore(settings.policy_url, settings.run, TRAINED)
    try:
        version = store.latest()
        return "" if version is None else store.manifest(version).lineage.preference_snapshot
    except (HonedError, OSError) as error:  # a line of the lineage, no reason not to train
        logger.warning("the reward model's manifest cannot be read; lineages leave it out", extra={"reason": str(error)})
        return ""
