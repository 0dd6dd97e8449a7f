"""A prompt from its admission to the gradient and the push, as a collector sees it: real queue, workers, learner and gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from tests.integration.conductor.fake_loop import NumberFile
from tests.integration.learner.harness import Learner, a_generator, recorded
from tests.integration.queue.servers import Server as RedisServer
from tests.support.collector import Collector, Seen, collecting
from tests.support.engine import FakeEngine
from tests.support.learner_world import World, batches, make_world
from tests.support.run import until
from tests.unit.learner.samples import VOCABULARY
from tests.unit.reward.support import TOKENIZER, FakeScorer

from honed.artifacts.version import VersionId
from honed.conductor.feeder import Feeder
from honed.conductor.prompts import PromptMix
from honed.conductor.settings import ConductorSettings, PromptMixSettings
from honed.generation.control import GenerationControlService
from honed.generation.frontend import RequestLimits, SamplingFrontend
from honed.generation.gate import RequestGate
from honed.generation.worker import RolloutWorker
from honed.kit.channel import connect
from honed.kit.otlp import Collector as Destination
from honed.kit.otlp import exporting
from honed.kit.server import Listener, Server, ServerOptions, Servicer
from honed.learner.data.episode import Vocabulary
from honed.learner.loop.spans import LINKED, train_spans, update_span
from honed.learner.sources.scored_stream import Intake, IntakeSettings
from honed.learner.sources.trained import TrainedIds
from honed.queue.admission import AdmissionPolicy
from honed.queue.connection import RedisLink, RetryPolicy
from honed.queue.holding import holding
from honed.queue.keys import PROMPTS, ROLLOUTS, SCORED, RunKeys
from honed.queue.lease import Leases
from honed.queue.messages import Message
from honed.queue.progress import LearnerProgress, ProgressBoard
from honed.queue.stream import DeliverySettings, WorkQueue
from honed.reward.batching import BatchSettings, DynamicBatcher
from honed.reward.reward import Term, WeightedSum
from honed.reward.worker import ScoringWorker
from honed.v1 import generation_pb2_grpc

pytestmark = [pytest.mark.redis, pytest.mark.timeout(180)]

RUN, BATCH, SAMPLES = "r", 4, 2
CONTROL = "honed.v1.GenerationControlService"


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


class Loop:
    """Every stage of a run of one update, in this process."""

    def __init__(self, link: RedisLink, world: World) -> None:
        self.link, self.world, self.keys = link, world, RunKeys(RUN)
        gate = RequestGate(8, 100, 0.5)
        gate.open()
        self.engine = FakeEngine(gate, VersionId(0, 0))
        limits = RequestLimits(max_samples=4, max_tokens=64, default_max_tokens=8, max_prompt_tokens=20)
        self.frontend = SamplingFrontend(self.engine, gate, limits, RUN)
        self.stopping = asyncio.Event()

    def queue(self, stage: str) -> WorkQueue:
        return WorkQueue(self.link, self.keys, stage, f"{stage}-consumer", DeliverySettings(sweep_ms=20))

    async def admit(self) -> None:
        """What the conductor does in one step."""
        settings = ConductorSettings(
            samples_per_prompt=SAMPLES, response_tokens=5, prompt_mix=PromptMixSettings(submitted=0.0, application=0.0)
        )
        mix = PromptMix(RUN, NumberFile(), None, 0, settings)  # type: ignore[arg-type]
        await ProgressBoard(self.link, self.keys).write(LearnerProgress(fence=1, update=0, served=0, samples=SAMPLES))
        async with Leases(self.link, self.keys).held("conductor", "conductor-1", 5_000) as lease:
            policy = AdmissionPolicy(BATCH, 2, 100, SAMPLES)
            assert await Feeder(self.link, self.keys, lease, mix, policy, steps=1).step()

    @asynccontextmanager
    async def workers(self) -> AsyncIterator[None]:
        """Generation and reward."""
        sampling = RolloutWorker(self.frontend, self.queue(PROMPTS), self._nothing)
        reward = WeightedSum([Term(FakeScorer(version="v7", value=lambda text: float(len(text))), 1.0)])
        batcher = DynamicBatcher(lambda: reward, BatchSettings(64, 0.001, 128))
        scoring = ScoringWorker(self.queue(ROLLOUTS), batcher, TOKENIZER)
        async with batcher.running(), asyncio.TaskGroup() as group:
            for worker in (sampling, scoring):
                group.create_task(worker.run(self.stopping))
            yield
            self.stopping.set()

    @asynccontextmanager
    async def generator(self) -> AsyncIterator[None]:
        """The control service that the learner pushes to."""
        control = GenerationControlService(self.frontend, self.world.store, self.world.root / "versions")
        servicer = Servicer(CONTROL, generation_pb2_grpc.add_GenerationControlServiceServicer_to_server, control)
        server = Server([Listener("127.0.0.1", 0, [servicer])], ServerOptions())
        await server.start()
        async with connect(f"127.0.0.1:{server.ports[0]}") as channel:
            self.world.generators = [generation_pb2_grpc.GenerationControlServiceStub(channel)]  # type: ignore[list-item]
            yield
        await server.stop()

    async def learn(self) -> None:
        """One update, and its push."""
        queue = self.queue(SCORED)
        async with holding(queue) as held:
            limits = IntakeSettings(max_staleness=2)
            self.world.intake = Intake(queue, held, Vocabulary(VOCABULARY), limits, TrainedIds(RUN))  # type: ignore[assignment]
            self.world.steps = 1
            learner = await self.world.start()
            served = VersionId(1, 1)
            await self.world.until(learner, lambda: learner.status.served == served and learner.status.finished)
            await self.world.intake.close()  # type: ignore[attr-defined]
        assert learner.status.version == served

    async def _nothing(self) -> None:
        pass


async def one_update(redis: RedisServer, root: Path, endpoint: str, ratio: float = 1.0) -> None:
    async with RedisLink(redis.url, retry=RetryPolicy(deadline_s=10)) as link:
        await link.redis.flushall()
        loop = Loop(link, make_world(root))
        with exporting(Destination(endpoint), ratio, {"service.name": "all"}):
            await loop.admit()
            async with loop.workers(), loop.generator():
                await loop.learn()


async def test_one_trace_leads_from_a_prompts_admission_to_the_update_and_its_push(redis: RedisServer, tmp_path: Path) -> None:
    with collecting() as collector:
        await one_update(redis, tmp_path, collector.endpoint)
    update = collector.one("update")
    admissions = {span.attributes["honed.prompt"]: span for span in collector.named("admit")}
    assert set(admissions) == {"r-0", "r-1"}
    assert len({span.trace for span in admissions.values()} | {update.trace}) == 3
    for prompt, admit in admissions.items():
        assert (admit.kind, admit.parent, admit.attributes["honed.source"]) == ("producer", "", "file")
        [generate] = [span for span in collector.named("generate") if span.trace == admit.trace]
        assert (generate.kind, generate.parent) == ("consumer", admit.id)
        rollouts = [f"{prompt}/{sample}" for sample in range(SAMPLES)]
        assert generate.attributes["honed.rollouts"] == rollouts
        assert generate.attributes["honed.versions"] == ["0.0"]
        assert generate.attributes["honed.response_tokens"] == 5 * SAMPLES
        assert 0 <= generate.attributes["honed.queue_wait_s"] < 60
        for rollout in rollouts:
            score, train = (about(collector, name, rollout) for name in ("score", "train"))
            assert (score.trace, score.parent) == (admit.trace, generate.id)
            assert (score.attributes["honed.reward"], score.attributes["honed.scorers"]) == (5.0, ["fake@v7"])
            assert (train.trace, train.parent) == (admit.trace, score.id)
            assert train.links == (update.place,)
            assert train.place != update.place
            assert score.place in update.links, "and back from the update to the rollout"
            assert (train.attributes["honed.update"], train.attributes["honed.staleness"]) == (1, 0)
            assert generate.start_ns < score.start_ns < train.start_ns < train.end_ns <= update.end_ns
    assert len(update.links) == BATCH
    assert update.attributes["honed.version"] == "1.1"


async def test_the_updates_trace_goes_on_through_the_push_into_the_generator(redis: RedisServer, tmp_path: Path) -> None:
    with collecting() as collector:
        await one_update(redis, tmp_path, collector.endpoint)
    update = collector.one("update")
    below = {span.name: span for span in collector.spans if span.parent == update.id}
    assert set(below) == {"journal", "checkpoint", "publish"}
    [push] = [span for span in collector.named("push") if span.trace == update.trace]
    assert push.parent == below["publish"].id
    assert (push.attributes["honed.version"], push.attributes["honed.committed"]) == ("1.1", 1)
    for method in ("PrepareVersion", "CommitVersion"):
        client, server = (
            next(s for s in collector.named(f"{CONTROL}/{method}") if s.kind == kind and s.trace == update.trace)
            for kind in ("client", "server")
        )
        assert (client.parent, server.parent) == (push.id, client.id)
        for span in (client, server):
            assert span.attributes == {
                "rpc.system": "grpc", "rpc.service": CONTROL, "rpc.method": method, "rpc.grpc.status_code": 0,
            }  # fmt: skip
    prepared = next(s for s in collector.named(f"{CONTROL}/PrepareVersion") if s.kind == "server")
    assert collector.one("fetch").parent == prepared.id
    assert not [span.name for span in collector.spans if span.failed]


async def test_the_admission_alone_decides_what_is_sampled(redis: RedisServer, tmp_path: Path) -> None:
    """Nothing of a prompt that is not sampled is recorded anywhere, the update of such prompts included."""
    with collecting() as collector:
        await one_update(redis, tmp_path, collector.endpoint, ratio=0.0)
    assert collector.spans == []


async def test_the_learners_own_process_continues_what_the_entries_carry_and_flushes_at_its_stop(
    redis: RedisServer, tmp_path: Path
) -> None:
    traces = [f"{number + 1:032x}" for number in range(BATCH)]
    flags = ["01", "00", "01", "01"]  # one that its admission did not sample

    def carried(number: int, message: Message) -> Message:
        traceparent = f"00-{traces[number]}-{number + 1:016x}-{flags[number]}"
        return replace(message, traceparent=traceparent)

    with collecting() as collector:
        async with a_generator() as (generator, address), RedisLink(redis.url, retry=RetryPolicy(deadline_s=10)) as link:
            (tmp_path / "headers").write_text("x-tenant: honed\n")
            learner = Learner(tmp_path, "small", redis.url, [address], batch=BATCH, steps=None)
            learner.tree["telemetry"] = {"otlp_endpoint": collector.endpoint, "headers_file": str(tmp_path / "headers")}
            learner.write()
            async with learner.process() as process:
                messages = [carried(i, message) for i, message in enumerate(recorded(BATCH, BATCH))]
                await WorkQueue(link, RunKeys("small"), SCORED, "recorder").put(messages)
                await learner.checkpointed(1, process)
                await until(lambda: "1.1" in generator.serving, 60, "the version is pushed")
                process.terminate()
                assert await asyncio.wait_for(process.wait(), 30) == 0, learner.log.read_text()[-2000:]
    assert collector.metadata["x-tenant"] == "honed"
    assert {span.service for span in collector.spans} == {"honed-learner"}
    update = collector.one("update")
    sampled = [number for number in range(BATCH) if flags[number] == "01"]
    assert {(s.trace, s.parent) for s in collector.named("train")} == {(traces[n], f"{n + 1:016x}") for n in sampled}
    assert sorted(update.links) == [(traces[n], f"{n + 1:016x}") for n in sampled]
    [push] = [span for span in collector.named("push") if span.trace == update.trace]
    [commit] = [span for span in collector.spans if span.name.endswith("/CommitVersion") and span.trace == update.trace]
    assert commit.parent == push.id
    assert f"00-{commit.trace}-{commit.id}-01" in generator.traceparents
    line = next(line for line in learner.log.read_text().splitlines() if '"message": "update"' in line)
    assert f'"trace_id": "{update.trace}"' in line


@pytest.mark.parametrize(("flags", "shown"), [("01", LINKED), ("00", 0)], ids=["sampled", "not sampled"])
async def test_of_a_large_batch_as_many_rollouts_are_shown_as_a_span_has_links(flags: str, shown: int) -> None:
    [batch] = batches(1, size=LINKED + 20)
    traced = []
    for number, each in enumerate(batch, start=1):
        message = replace(each.delivery.message, traceparent=f"00-{number:032x}-{number:016x}-{flags}")
        traced.append(replace(each, delivery=replace(each.delivery, message=message)))
    with (
        collecting() as collector,
        exporting(Destination(collector.endpoint), 1.0, {"service.name": "learner"}),
        update_span(traced, 1),
        train_spans(traced, 0),
    ):
        pass
    assert len(collector.named("train")) == shown
    assert [len(update.links) for update in collector.named("update")] == ([shown] if shown else [])


def about(collector: Collector, name: str, rollout: str) -> Seen:
    [found] = [span for span in collector.named(name) if span.attributes["honed.rollout"] == rollout]
    return found
