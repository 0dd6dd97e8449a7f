"""The learner process: locks its directory, takes the lease, resumes, trains, and answers LearnerService."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import torch
from redis.exceptions import ResponseError

from honed.artifacts.reward_models import TRAINED, RewardModelStore
from honed.artifacts.store import PolicyStore
from honed.config import RunSettings
from honed.kit.errors import FailedPrecondition
from honed.kit.server import Listener, Server, Servicer, serve_until_signalled
from honed.kit.wiring import consumer_name, internal_channel, redis_url, server_options
from honed.learner.build import build_trainer, config_hash
from honed.learner.checkpoint import CheckpointStore
from honed.learner.directory_lock import locked
from honed.learner.episodes import Vocabulary
from honed.learner.exporter import Exporter
from honed.learner.intake import Intake, IntakeSettings
from honed.learner.journal import Journal
from honed.learner.loop import LoopSettings, TrainingLoop
from honed.learner.pause import PauseFile
from honed.learner.push import Pusher, RegisteredGenerators
from honed.learner.release import BASE, Release
from honed.learner.rollback import History, Weights
from honed.learner.run_state import RunState
from honed.learner.service import LearnerService, LoadedLearner
from honed.learner.status import LearnerStatus, NoPromotions, Reporter
from honed.learner.trained import TrainedIds
from honed.learner.training import Training
from honed.learner.update import PPOTrainer
from honed.models.loader import load_language_model
from honed.queue.connection import Link, Outage
from honed.queue.holding import Holding, holding
from honed.queue.identity import RunIdentity
from honed.queue.keys import SCORED, RunKeys
from honed.queue.lease import HeldLease, Leases
from honed.queue.members import GENERATION, Members
from honed.queue.progress import ProgressBoard
from honed.queue.scripts import GROUP
from honed.queue.stream import QueueSettings, WorkQueue
from honed.v1 import learner_pb2_grpc
from honed.workspace import Workspace

logger = logging.getLogger(__name__)

SERVICE: Final = "honed.v1.LearnerService"
LEASE_MS: Final = 6_000
_WATCHES: Final = (f"/{SERVICE}/WatchMetrics", f"/{SERVICE}/WatchPushes")
_CONSUMER: Final = re.compile(r"learner-(\d+)")


async def run(settings: RunSettings) -> None:
    """Serves until SIGTERM.

    Raises:
        FailedPrecondition: There is no base version, or another learner holds the run or its directory.
        LeaseLost: Another learner took over.
    """
    section, home = settings.learner, Workspace(settings.directory).learner
    status = LearnerStatus()
    loaded: asyncio.Future[LoadedLearner] = asyncio.get_running_loop().create_future()
    service = LearnerService(settings.run, section.steps, status, loaded)
    servicer = Servicer(SERVICE, learner_pb2_grpc.add_LearnerServiceServicer_to_server, service)
    server = Server([Listener(section.host, section.port, [servicer])], server_options(settings, section, _WATCHES))

    async def work(stopping: asyncio.Event) -> None:
        # A run outlives any outage of Redis: what waits for it waits.
        async with Link(redis_url(settings), outage=Outage(math.inf)) as link:
            try:
                async with locked(home):
                    await _hold_lease(settings, home, link, status, server, stopping, loaded)
            finally:
                loaded.cancel()  # streams that still wait for it end

    await serve_until_signalled(server, work)


async def _hold_lease(
    settings: RunSettings,
    home: Path,
    link: Link,
    status: LearnerStatus,
    server: Server,
    stopping: asyncio.Event,
    loaded: asyncio.Future[LoadedLearner],
) -> None:
    """Trains as long as the lease is held."""
    keys = RunKeys(settings.run)
    store = PolicyStore(settings.policy_url, settings.run)
    identity, base = RunIdentity(link, keys), await asyncio.to_thread(store.manifest, BASE)
    await identity.check(base.digest)
    newest = await asyncio.to_thread(store.latest)
    above = max(newest.fence if newest else 0, CheckpointStore(home / "checkpoints").newest_fence())
    async with Leases(link, keys).held("learner", consumer_name("learner"), LEASE_MS, above) as lease:
        await _train(settings, home, link, store, lease, lambda: identity.check(base.digest), status, server, stopping, loaded)


async def _train(
    settings: RunSettings,
    home: Path,
    link: Link,
    store: PolicyStore,
    lease: HeldLease,
    identify: Callable[[], Awaitable[None]],
    status: LearnerStatus,
    server: Server,
    stopping: asyncio.Event,
    loaded: asyncio.Future[LoadedLearner],
) -> None:
    """Loads everything, trains until told to stop, and leaves the queue."""
    section, keys = settings.learner, RunKeys(settings.run)
    status.fence = lease.claim.fence
    checkpoints = CheckpointStore(home / "checkpoints", keep=section.keep_checkpoints)
    await asyncio.to_thread(_remove_leftovers, home, checkpoints, lease.claim.fence)
    # The base version 0.0 is where training starts, and the reference of the KL penalty.
    base = await asyncio.to_thread(store.fetch, BASE, home / "base")
    trainer = await asyncio.to_thread(build_trainer, settings, base)
    journal = await asyncio.to_thread(lambda: Journal(home, most_mb=section.journal_mb))
    limits = QueueSettings(int(settings.queue.lease_s * 1000), settings.queue.max_deliveries)
    queue = WorkQueue(link, keys, SCORED, f"learner-{lease.claim.fence}", limits)
    generators = _generators(settings, link)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(generators.close)
        held = await stack.enter_async_context(holding(queue))
        intake = _intake(settings, queue, held, trainer, status)
        stack.push_async_callback(intake.close)
        training = Training(trainer, checkpoints, timeout_s=section.update_timeout_s, stop_within_s=section.drain_s / 2)
        release = Release(
            store,
            Exporter(trainer.policy, base, home / "export", dtype=settings.generation.weights_dtype),
            Pusher(generators, timeout_s=section.push_timeout_s),
            journal,
            lease,
            status,
            keep=settings.policy.keep,
            config_hash=config_hash(settings),
            preference_snapshot=_snapshot(settings),
            clock=time.time,
        )
        reporter = _reporter(settings, link, queue, status, identify)
        state = RunState(training, intake, checkpoints, journal, release, lease, status, reporter, time.time)
        await asyncio.to_thread(state.load)
        await state.take_over(await _predecessors(link, keys, queue.consumer))
        await reporter.refresh()
        history = History(checkpoints, store, journal, home / "fetched", _load_weights)
        pause = PauseFile(home)
        loop = TrainingLoop(state, history, _loop_settings(settings, trainer), stopping, paused=bool(pause))
        loaded.set_result(LoadedLearner(loop, journal, history, pause))
        await server.ready()
        async with _beside(reporter, journal, stopping):
            await loop.run()
        await queue.leave()


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


def _generators(settings: RunSettings, link: Link) -> RegisteredGenerators:
    section = settings.generation
    fallback = section.control_address or (f"{section.host}:{section.control_port}" if section.control_port else "")
    members = Members(link, RunKeys(settings.run), GENERATION)
    return RegisteredGenerators(members, lambda address: internal_channel(settings, address), fallback=fallback)


def _intake(settings: RunSettings, queue: WorkQueue, held: Holding, trainer: PPOTrainer, status: LearnerStatus) -> Intake:
    return Intake(
        queue,
        held,
        Vocabulary(trainer.policy.vocabulary_size),
        IntakeSettings(settings.learner.max_staleness, settings.generation.max_model_tokens, settings.reward.on_promotion),
        TrainedIds(settings.run),
        lambda: status.scorers,
    )


def _reporter(
    settings: RunSettings, link: Link, queue: WorkQueue, status: LearnerStatus, identify: Callable[[], Awaitable[None]]
) -> Reporter:
    async def dropped() -> Mapping[str, int]:
        stats = await queue.stats()
        return {**stats.dropped, **({"dead_letter": stats.dead} if stats.dead else {})}

    board = ProgressBoard(link, RunKeys(settings.run))
    samples = settings.conductor.samples_per_prompt
    return Reporter(status, board, samples=samples, dropped=dropped, promotions=NoPromotions(), identify=identify)


def _loop_settings(settings: RunSettings, trainer: PPOTrainer) -> LoopSettings:
    section = settings.learner
    on_gpu = trainer.policy.device.type != "cpu"
    return LoopSettings(
        batch=section.batch,
        steps=section.steps,
        checkpoint_every=section.checkpoint_every,
        max_staleness=section.max_staleness,
        overlap_push=on_gpu if section.overlap_push is None else section.overlap_push,
        on_refused=section.on_refused,
        failures=section.bad_batches,
    )


async def _predecessors(link: Link, keys: RunKeys, own: str) -> list[str]:
    """Learners whose names the queue still knows, the oldest first: their processes are gone, the lease says so."""
    try:
        rows = await link.call(lambda: link.redis.xinfo_consumers(keys.stream(SCORED), GROUP))
    except (FailedPrecondition, ResponseError):  # no stream or no group yet
        return []
    names = [row["name"].decode() for row in rows]
    found = {name: int(match[1]) for name in names if (match := _CONSUMER.fullmatch(name)) and name != own}
    return sorted(found, key=found.__getitem__)


def _remove_leftovers(home: Path, checkpoints: CheckpointStore, fence: int) -> None:
    """Removes what killed learners left: exports, fetched versions, unfinished checkpoints."""
    for name in ("export", "fetched"):
        shutil.rmtree(home / name, ignore_errors=True)
    checkpoints.clean(fence)


def _load_weights(directory: Path) -> Weights:
    """The language model's weights of a version's directory, on the host."""
    weights: Weights = load_language_model(directory, device=torch.device("cpu")).state_dict()
    return weights


def _snapshot(settings: RunSettings) -> str:
    """The judgements behind the run's newest reward model."""
    store = RewardModelStore(settings.policy_url, settings.run, TRAINED)
    version = store.latest()
    return "" if version is None else store.manifest(version).lineage.preference_snapshot
