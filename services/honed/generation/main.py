"""The generation process: an engine, both gRPC services, and the rollout worker.

In this order: the ports, so that a second process of the same settings ends before it touches
anything; the directory's lock; the engine on the newest version that passes; what was pushed
meanwhile; readiness. At SIGTERM the other way round: readiness, training work, the calls in flight,
and the engine last.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.config import RunSettings
from honed.generation import metrics
from honed.generation.best_of import BestOf
from honed.generation.catch_up import CatchUp
from honed.generation.control import GenerationControlService
from honed.generation.engine import GenerationEngine, InitialVersion
from honed.generation.frontend import RequestLimits, SamplingFrontend
from honed.generation.gate import RequestGate, window_of
from honed.generation.home import own_directory
from honed.generation.make_engine import make_engine
from honed.generation.quarantine import fetch_or_mark, mark_disagreeing
from honed.generation.scoring import CandidateScoring
from honed.generation.service import GenerationService
from honed.generation.settings import GenerationSettings
from honed.generation.stall import StallWatch
from honed.generation.worker import RolloutWorker
from honed.kit.address import host_port
from honed.kit.aio import unless
from honed.kit.errors import FailedPrecondition, NotFound, Unavailable, root_cause
from honed.kit.server import Lifecycle, Listener, Server, Servicer, serve_until_signalled
from honed.models.chat import ChatMessage
from honed.models.tokenizer import TextTokenizer, load_tokenizer, render_chat
from honed.queue.application import ApplicationPrompts
from honed.queue.connection import RetryPolicy
from honed.queue.identity import RunIdentity
from honed.queue.keys import PROMPTS, RunKeys
from honed.queue.members import GENERATION, Member, Members, registered
from honed.queue.progress import ProgressBoard
from honed.queue.stream import DeliverySettings, WorkQueue
from honed.runtime import consumer_name, leads_nowhere, redis_link, server_options
from honed.v1 import generation_pb2, generation_pb2_grpc
from honed.workspace import Workspace

logger = logging.getLogger(__name__)

PUBLIC = "honed.v1.GenerationService"
CONTROL = "honed.v1.GenerationControlService"


async def run(settings: RunSettings) -> None:
    """Serves until SIGTERM.

    Raises:
        OSError: A port is taken.
        FailedPrecondition: The policy store holds no version, this replica runs already, or the learner could not reach it.
        Aborted: No version of the store can be served.
        Unavailable: The engine died or stands still.
    """
    section = settings.generation
    generator = Generator(settings)
    _check_control_address(settings)
    add_public = generation_pb2_grpc.add_GenerationServiceServicer_to_server
    add_control = generation_pb2_grpc.add_GenerationControlServiceServicer_to_server
    public = Servicer(PUBLIC, add_public, GenerationService(generator.frontend, generator.best_of, generator.name))
    control = Servicer(CONTROL, add_control, generator.control)
    listeners = [
        Listener(section.host, section.port, [public], when_ready=True),
        Listener(section.host, section.control_port, [control]),
    ]
    server = Server(listeners, server_options(settings, section))
    await serve_until_signalled(server, partial(generator.work, server))


class Generator:
    """The parts of the process, and the order in which they start and end."""

    def __init__(self, settings: RunSettings) -> None:
        """Reads the password of Redis, and touches no network."""
        self._settings = settings
        self._section = section = settings.generation
        self.name = consumer_name("generation")
        self._store = PolicyStore(settings.policy_url, settings.run)
        self._generators = Workspace(settings.directory).generators
        self._versions = self._generators / str(section.replica) / "versions"
        self._candidates: list[InitialVersion] = []
        gate = make_gate(section)
        self._engine = make_engine(section, self._candidates, gate)
        self._chat = ChatRenderer()
        self._link = redis_link(settings, RetryPolicy(settings.queue.outage_s))
        keys = RunKeys(settings.run)
        wanted = settings.conductor.application_prompts
        self._offered = ApplicationPrompts(
            self._link, keys, wanted, decode=self._engine.decode, on_outcome=metrics.count_application_prompt
        )
        self.frontend = SamplingFrontend(
            self._engine, gate, limits(section), settings.run, render_chat=self._chat, on_prompt=self._offered.offer
        )
        self._scoring = CandidateScoring(settings)
        self.best_of = BestOf(self.frontend, self._scoring)
        self.control = GenerationControlService(self.frontend, self._store, self._versions, lambda: self._changed())
        self._members = Members(self._link, keys, GENERATION)
        self._identity = RunIdentity(self._link, keys)
        leases = DeliverySettings(int(settings.queue.lease_s * 1000), settings.queue.max_deliveries)
        queue = WorkQueue(self._link, keys, PROMPTS, self.name, leases)
        self._worker = RolloutWorker(
            self.frontend, queue, self._check_identity, drain_s=section.drain_s, late_shown_s=2 * section.request_timeout_s
        )
        self._catch_up = CatchUp(self.control, ProgressBoard(self._link, keys), self._worker.allowed)
        metrics.observe(gate, self._worker)
        self._ready = False
        self._changed: Callable[[], None] = lambda: None
        self._base_digest: str | None = None

    async def work(self, server: Server, lifecycle: Lifecycle) -> None:
        """Loads, serves and works until the calls in flight at the end have ended."""
        try:
            with own_directory(self._generators, self._section.replica):
                async with registered(self._members, self._describe) as self._changed, self._offered.running():
                    if await unless(lifecycle, self._start()):
                        await self._serve(server, lifecycle)
        finally:
            await self._engine.close()
            await self._scoring.close()
            await self._link.close()

    async def _start(self) -> bool:
        self._candidates += await asyncio.to_thread(lambda: list(_candidates(self._store, self._versions)))
        await self._engine.start()
        self._chat.tokenizer = await asyncio.to_thread(load_tokenizer, self._versions / self._engine.version.label)
        refused = self._engine.refused
        self._catch_up.refused.update(refused)
        disagreeing = {version: refused[version] for version in self._engine.disagreeing}
        if disagreeing:
            await asyncio.to_thread(mark_disagreeing, self._store, disagreeing, await self._catch_up.served())
        await self._catch_up.join()
        # What lives by now lives to the end. A full collection over it would hold up everything for
        # a third of a second.
        gc.collect()
        gc.freeze()
        return True

    async def _serve(self, server: Server, lifecycle: Lifecycle) -> None:
        engine, gate = self._engine, self.frontend.gate
        await server.ready()
        self._ready = True
        self._changed()
        logger.info("serving", extra={"version": engine.version.label, "engine": engine.description})
        try:
            async with asyncio.TaskGroup() as group:
                watches = [
                    group.create_task(_fail_when_dead(engine)),
                    group.create_task(StallWatch(engine, gate, self._section.stall_s).run()),
                    group.create_task(self._catch_up.run()),
                    group.create_task(self._worker.run(lifecycle)),
                ]
                await lifecycle.wait()
                self._ready = False
                self._changed()
                # Calls in flight need the engine, and training may finish what it has. The worker ends by itself.
                await lifecycle.drained.wait()
                await watches.pop()
                for watch in watches:
                    watch.cancel()
        except BaseExceptionGroup as failures:
            raise root_cause(failures) from failures

    def _describe(self) -> Member:
        section = self._section
        control = section.control_address or host_port(section.host, section.control_port)
        refused, version = self._catch_up.refused, ""
        troubles = [self._worker.late] if self._worker.late else []
        with contextlib.suppress(Unavailable):  # nothing serves yet
            serving = self._engine.version
            version = serving.label
            troubles += [f"version {newer} is refused: {reason}" for newer, reason in refused.items() if newer > serving]
        facts = {"replica": str(section.replica), "training": self._worker.state, "metrics_port": str(section.metrics_port)}
        if refused:
            facts["refused"] = "; ".join(f"{each}: {reason}" for each, reason in refused.items())
        if troubles:
            facts["alarm"] = "; ".join(troubles)
        ready = self._ready and not self.frontend.draining
        return Member(self.name, section.target, control, version, ready, facts)

    async def _check_identity(self) -> None:
        if self._base_digest is None:
            try:
                base = await asyncio.to_thread(self._store.manifest, VersionId(0, 0))
            except NotFound:
                return  # a run whose base was taken away by hand: nothing to compare
            self._base_digest = base.digest
        await self._identity.check(self._base_digest)


class ChatRenderer:
    """The policy's chat template, once the policy is there."""

    def __init__(self) -> None:
        """Knows no template yet."""
        self.tokenizer: TextTokenizer | None = None

    def __call__(self, messages: Sequence[generation_pb2.ChatMessage]) -> list[int]:
        """Token ids of a conversation.

        Raises:
            InvalidArgument: There is no template, or it refuses the messages.
            Unavailable: No version serves yet.
        """
        if self.tokenizer is None:
            raise Unavailable("the engine has not started; try again")
        return render_chat(self.tokenizer, [ChatMessage(m.role, m.content) for m in messages], field="prompt.messages")


def limits(section: GenerationSettings) -> RequestLimits:
    """What one request may ask for."""
    return RequestLimits(
        max_samples=section.max_samples,
        max_tokens=section.max_tokens,
        default_max_tokens=min(section.default_max_tokens, section.max_tokens),  # a lower cap alone must not refuse the default
        max_prompt_tokens=section.max_prompt_tokens,
    )


def make_gate(section: GenerationSettings) -> RequestGate:
    """The gate before the engine."""
    window = window_of(section.max_num_seqs)
    return RequestGate(window, section.max_queued, section.application_share, training_limit=section.rollout_concurrency)


def _check_control_address(settings: RunSettings) -> None:
    section = settings.generation
    elsewhere = settings.conductor.services_elsewhere
    if elsewhere and section.control_address is None and leads_nowhere(section.host, section.control_port):
        raise FailedPrecondition(
            f"generation.control_address is not set, and {section.host}:{section.control_port} leads nowhere: say where the "
            "learner reaches this replica, by HONED_GENERATION__CONTROL_ADDRESS"
        )


def _candidates(store: PolicyStore, directory: Path) -> Iterator[InitialVersion]:
    """The versions to try, newest first; each is fetched when its turn comes.

    Raises:
        FailedPrecondition: There is none.
    """
    versions = store.servable()
    if not versions:
        raise FailedPrecondition(
            f"the policy store holds no version of run {store.run!r}: `honed up` publishes the first; "
            "for services that are started one by one, `honed job pretrain` does"
        )
    for version in versions:
        yield InitialVersion(version, partial(fetch_or_mark, store, version, directory))


async def _fail_when_dead(engine: GenerationEngine) -> None:
    raise Unavailable(f"the engine died: {await engine.wait_dead()}")
