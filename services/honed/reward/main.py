"""The reward process: scorers, dynamic batching, the gRPC service, promotions, and the scoring worker."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import torch

from honed.artifacts.promotions import PromotionRecord
from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.config import RunSettings
from honed.kit.aio import unless
from honed.kit.errors import FailedPrecondition, HonedError, NotFound, Unavailable
from honed.kit.server import Listener, Server, Servicer, serve_until_signalled
from honed.queue.connection import RedisLink, RetryPolicy
from honed.queue.identity import RunIdentity
from honed.queue.keys import ROLLOUTS, RunKeys
from honed.queue.members import Member, Members, registered
from honed.queue.stream import DeliverySettings, WorkQueue
from honed.reward.batching import BatchSettings, DynamicBatcher
from honed.reward.ensemble import EnsembleScorer
from honed.reward.follower import RecordFollower
from honed.reward.function_scorer import find_function
from honed.reward.model_scorer import ModelScorer
from honed.reward.policy_tokenizer import policy_tokenizer
from honed.reward.promoter import Promoter
from honed.reward.registry import BuildScorer, ScorerRegistry
from honed.reward.remote_scorer import RemoteScorer
from honed.reward.replicas import NoReplicas, RedisReplicas
from honed.reward.reward import Truncation
from honed.reward.scorer import Scorer, ScoringTokenizer
from honed.reward.service import RewardService
from honed.reward.settings import RewardSettings, ScorerSettings
from honed.reward.sources import ModelSources
from honed.reward.worker import ScoringWorker
from honed.runtime import consumer_name, redis_link, server_options
from honed.v1 import reward_pb2_grpc

logger = logging.getLogger(__name__)

_GROUP: Final = 256  # rollouts that the worker takes at once
_WAIT_S: Final = 60.0  # for a policy that is not there yet, before the log says so
_CONTROL_OUTAGE_S: Final = 2.0  # promotions say soon that Redis is away; heartbeats come again anyhow

SERVICE = "honed.v1.RewardService"


async def run(settings: RunSettings, *, with_worker: bool = True) -> None:
    """Serves until SIGTERM.

    Args:
        settings: The run.
        with_worker: False serves the endpoints alone, without Redis.

    Raises:
        HonedError: A scorer cannot be loaded, or a scorer hangs.
    """
    torch.set_num_threads(settings.reward.threads)
    async with AsyncExitStack() as links:
        process = _Process(settings)
        if with_worker:
            process.join(await links.enter_async_context(redis_link(settings, RetryPolicy(settings.queue.outage_s))))
        # The batcher outlives the server, so that calls in flight at a SIGTERM are answered.
        async with process.batcher.running():
            await serve_until_signalled(process.server(), process.work)


class _Process:
    """The parts of one reward process. Ports open first; what must be loaded or waited for comes after."""

    def __init__(self, settings: RunSettings) -> None:
        """Opens nothing."""
        self._settings = settings
        self._name, self._keys = consumer_name("reward"), RunKeys(settings.run)
        self._registry = ScorerRegistry(settings.reward.scorers)
        self._sources = model_sources(settings)
        self._record = PromotionRecord(settings.policy_url, settings.run)
        self._follower = RecordFollower(self._registry, self._sources, self._record, NoReplicas())
        self._members: Members | None = None
        self._tokenizer: ScoringTokenizer | None = None
        self._worker: ScoringWorker | None = None
        self._ready = False
        self._link: RedisLink | None = None
        limits = settings.reward
        self.batcher = DynamicBatcher(
            lambda: self._registry.serving, BatchSettings(limits.batch_tokens, limits.batch_wait_ms / 1000, limits.max_queued)
        )

    def join(self, link: RedisLink) -> None:
        """Scores rollouts, and promotes together with other replicas."""
        self._link = link
        replicas = RedisReplicas(link.within(_CONTROL_OUTAGE_S), self._keys, self._name)
        self._members = replicas.members
        self._follower = RecordFollower(self._registry, self._sources, self._record, replicas)

    def server(self) -> Server:
        """The gRPC side."""
        section = self._settings.reward
        service = RewardService(self.batcher, self._registry, Promoter(self._follower), self._policy_tokenizer)
        servicer = Servicer(SERVICE, reward_pb2_grpc.add_RewardServiceServicer_to_server, service)
        self._server = Server([Listener(section.host, section.port, [servicer])], server_options(self._settings, section))
        return self._server

    async def work(self, stopping: asyncio.Event) -> None:
        """Loads, becomes ready, and scores rollouts until `stopping` is set."""
        async with AsyncExitStack() as stack:
            changed: Callable[[], None] = lambda: None  # noqa: E731
            if self._members is not None:
                changed = await stack.enter_async_context(registered(self._members, self._describe))
            await unless(stopping, self._load())
            if stopping.is_set():
                return
            await self._become_ready()
            stack.push_async_callback(_cancel, asyncio.create_task(self._follower.watch(changed)))
            stack.push_async_callback(_cancel, asyncio.create_task(self._resign(stopping, changed)))
            if self._link is None:
                await stopping.wait()
                return
            self._worker = self._scoring_worker(self._link)
            await self._worker.run(stopping)

    def _scoring_worker(self, link: RedisLink) -> ScoringWorker:
        settings, identity = self._settings, RunIdentity(link, self._keys)
        policies = PolicyStore(settings.policy_url, settings.run)
        leases = DeliverySettings(int(settings.queue.lease_s * 1000), settings.queue.max_deliveries)

        async def check_run() -> None:
            try:
                base = await asyncio.to_thread(policies.manifest, VersionId(0, 0))
            except NotFound:
                return  # nothing to compare; nobody samples before there is one
            await identity.check(base.digest)

        return ScoringWorker(
            WorkQueue(link, self._keys, ROLLOUTS, self._name, leases),
            self.batcher,
            self._policy_tokenizer(),
            min(_GROUP, settings.reward.max_queued),
            check_run,
        )

    async def _load(self) -> None:
        section = self._settings.reward
        tokenizer = self._tokenizer = await _tokenizer(self._settings)
        await self._follower.start(make_builder(section, tokenizer, self._sources), make_truncation(section, tokenizer))

    async def _become_ready(self) -> None:
        # Registered as ready before the record is read once more: a promotion after that waits for this process, and one
        # before is in the record.
        self._ready = True
        if self._members is not None:
            with contextlib.suppress(HonedError):  # Redis is away; the heartbeat tries again
                await self._members.register(self._describe())
        await self._follower.catch_up()
        await self._server.ready()
        serving = {s.scorer.name: s.scorer.version for s in self._registry.scorers() if s.serving}
        logger.info("serving", extra={"scorers": serving})

    async def _resign(self, stopping: asyncio.Event, changed: Callable[[], None]) -> None:
        await stopping.wait()
        self._ready = False
        changed()

    def _describe(self) -> Member:
        working = "yes" if self._worker is not None and self._worker.working else "no"
        section = self._settings.reward
        facts = {**self._follower.facts(), "working": working, "metrics_port": str(section.metrics_port)}
        if self._worker is not None:
            facts |= self._worker.trouble.facts()
        return Member(self._name, section.target, ready=self._ready, facts=facts)

    def _policy_tokenizer(self) -> ScoringTokenizer:
        if self._tokenizer is None:
            raise Unavailable("the policy's tokenizer is still being loaded; try again soon")
        return self._tokenizer


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _tokenizer(settings: RunSettings) -> ScoringTokenizer:
    """The policy's tokenizer, as soon as the run has one."""
    store = PolicyStore(settings.policy_url, settings.run)
    while True:
        try:
            return await policy_tokenizer(store, _WAIT_S)
        except FailedPrecondition as error:
            logger.warning("not ready: the run has no policy yet", extra={"reason": str(error)})


def model_sources(settings: RunSettings) -> ModelSources:
    """Where this process takes reward models from."""
    section = settings.reward
    roots = [Path(root) for root in section.allowed_roots] or [settings.directory]
    into = settings.directory / "reward" / str(section.replica) / "models"
    return ModelSources(settings.policy_url, settings.run, into, roots, settings.policy.keep)


def make_builder(section: RewardSettings, tokenizer: ScoringTokenizer, sources: ModelSources) -> BuildScorer:
    """How this process makes a scorer from its settings and a source."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def model(scorer: ScorerSettings, source: str) -> ModelScorer:
        return ModelScorer(
            scorer.name,
            sources.local(source),
            tokenizer,
            sees_prompt=scorer.sees_prompt,
            batch_tokens=section.batch_tokens,
            device=device,
        )

    def build(scorer: ScorerSettings, source: str) -> Scorer:
        match scorer.kind:
            case "function":
                return find_function(scorer.name, source, scorer.options, sees_prompt=scorer.sees_prompt)
            case "ensemble":
                options = scorer.ensemble()
                return EnsembleScorer(scorer.name, [model(scorer, member) for member in options.members], options)
            case "remote":
                return RemoteScorer(scorer.name, source, scorer.remote(), sees_prompt=scorer.sees_prompt)
            case "reward_model":
                return model(scorer, source)

    return build


def make_truncation(section: RewardSettings, tokenizer: ScoringTokenizer) -> Truncation | None:
    """Where the settings cut the scored text."""
    cut = section.truncate
    return None if cut is None else Truncation.of_text(cut.token_text, cut.not_before, cut.missing_score, tokenizer)
