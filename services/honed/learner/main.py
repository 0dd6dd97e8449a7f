"""The learner process: takes the lease, resumes, trains, and answers LearnerService."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path

from honed.artifacts.reward_models import TRAINED, RewardModelStore
from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.config import RunSettings
from honed.kit.server import Listener, Server, Servicer, serve_until_signalled
from honed.kit.wiring import consumer_name, internal_channel, redis_url, server_options
from honed.learner.build import build_trainer, config_hash, vocabulary_of
from honed.learner.checkpoint import CheckpointStore
from honed.learner.exporter import Exporter
from honed.learner.intake import Intake
from honed.learner.ledger import Ledger
from honed.learner.loop import LoopSettings, Status, TrainingLoop
from honed.learner.publisher import Publisher
from honed.learner.service import LearnerService
from honed.queue.connection import Link, Outage
from honed.queue.holding import holding
from honed.queue.keys import SCORED, RunKeys
from honed.queue.lease import Claim, Leases
from honed.queue.stream import QueueSettings, WorkQueue
from honed.v1 import generation_pb2_grpc, learner_pb2_grpc
from honed.workspace import Workspace

logger = logging.getLogger(__name__)

SERVICE = "honed.v1.LearnerService"
LEASE_MS = 6_000
PREDECESSORS = 64


async def run(settings: RunSettings) -> None:
    """Serves until SIGTERM.

    Raises:
        FailedPrecondition: there is no base version, or another learner holds the run.
        LeaseLost: another learner took over.
    """
    mine = settings.learner
    link = Link(redis_url(settings), outage=Outage(settings.queue.outage_s))
    keys = RunKeys(settings.run)
    ledger = Ledger(Workspace(settings.directory).learner)
    status = Status()
    counting = WorkQueue(link, keys, SCORED, consumer_name("learner-status"))

    async def dropped() -> Mapping[str, int]:
        stats = await counting.stats()
        return {**stats.dropped, **({"dead_letter": stats.dead} if stats.dead else {})}

    service = LearnerService(settings.run, mine.steps or 0, status, ledger, dropped)
    servicer = Servicer(SERVICE, learner_pb2_grpc.add_LearnerServiceServicer_to_server, service)
    server = Server([Listener(mine.host, mine.port, [servicer])], server_options(settings, mine, [f"/{SERVICE}/WatchMetrics"]))

    async def work(stopping: asyncio.Event) -> None:
        store = PolicyStore(settings.policy_url, settings.run)
        leases = Leases(link, keys)
        try:
            newest = await asyncio.to_thread(store.latest)
            above = newest.fence if newest else 0
            async with leases.held("learner", consumer_name("learner"), LEASE_MS, above) as lease:
                await _train(settings, link, keys, leases, lease.claim, store, service, server, stopping)
        finally:
            await link.close()

    await serve_until_signalled(server, work)


async def _train(
    settings: RunSettings,
    link: Link,
    keys: RunKeys,
    leases: Leases,
    claim: Claim,
    store: PolicyStore,
    service: LearnerService,
    server: Server,
    stopping: asyncio.Event,
) -> None:
    mine, home = settings.learner, Workspace(settings.directory).learner
    status, ledger = service.status, service.ledger
    status.fence = claim.fence
    newest = await asyncio.to_thread(store.latest)
    base = await _base(store, home / "base")
    trainer = await asyncio.to_thread(build_trainer, settings, base)
    queue = WorkQueue(
        link,
        keys,
        SCORED,
        f"learner-{claim.fence}",
        QueueSettings(int(settings.queue.lease_s * 1000), settings.queue.max_deliveries),
    )
    channels = [internal_channel(settings, target) for target in _generators(settings)]
    try:
        async with holding(queue) as held:
            intake = Intake(
                queue,
                held,
                vocabulary_of(base, trainer.policy.vocabulary_size),
                max_staleness=mine.max_staleness,
                max_tokens=settings.generation.max_model_tokens,
            )
            publisher = Publisher(
                store,
                [generation_pb2_grpc.GenerationControlServiceStub(channel) for channel in channels],
                keep=settings.policy.keep,
                timeout_s=mine.push_timeout_s,
                check_lease=lambda: leases.check(claim),
            )
            loop = TrainingLoop(
                trainer,
                intake,
                CheckpointStore(home / "checkpoints", keep=mine.keep_checkpoints),
                ledger,
                Exporter(trainer.policy, base, home / "export", dtype=settings.generation.weights_dtype),
                publisher,
                LoopSettings(
                    mine.batch,
                    mine.steps or 1 << 40,
                    mine.checkpoint_every,
                    300.0,
                    config_hash(settings),
                    _snapshot(settings),
                    overlap_push=trainer.policy.device.type != "cpu" if mine.overlap_push is None else mine.overlap_push,
                ),
                status,
                check_lease=lambda: leases.check(claim),
            )
            progress = await asyncio.to_thread(loop.resume)
            predecessors = [f"learner-{fence}" for fence in range(max(1, claim.fence - PREDECESSORS), claim.fence)]
            trained = frozenset(progress.consumed).union(*(record.rollout_ids for record in ledger.steps))
            await intake.take_over(predecessors, trained)
            service.loop = loop
            await server.ready()
            await loop.run(stopping, newest)
    finally:
        for channel in channels:
            await channel.close()


async def _base(store: PolicyStore, directory: Path) -> Path:
    """The run's base version 0.0: where training starts, and the reference of the KL penalty."""
    return await asyncio.to_thread(store.fetch, VersionId(0, 0), directory)


def _generators(settings: RunSettings) -> tuple[str, ...]:
    mine = settings.generation
    return (mine.control_address or f"{mine.host}:{mine.control_port}",)


def _snapshot(settings: RunSettings) -> str:
    """The judgements behind the run's newest reward model."""
    store = RewardModelStore(settings.policy_url, settings.run, TRAINED)
    version = store.latest()
    return "" if version is None else store.manifest(version).lineage.preference_snapshot
