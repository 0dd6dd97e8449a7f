"""Two real generation processes: they register, keep out of each other's way, and one after the other can be replaced."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from loadtest.replicas import Replica, Replicas
from tests.integration.queue.servers import Server
from tests.support.run import environment, run_tree
from tests.support.tiny import make_canaries, make_tiny_model, publish_version

from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.kit.channel import connect
from honed.kit.tokens import read_token
from honed.queue.connection import RedisLink, RetryPolicy
from honed.queue.keys import RunKeys
from honed.queue.members import GENERATION, Members
from honed.queue.progress import LearnerProgress, ProgressBoard
from honed.v1 import common_pb2, generation_pb2, generation_pb2_grpc

pytestmark = [pytest.mark.redis, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(480)]
RUN = "small"


class Setting:
    def __init__(self, generators: Replicas, store: PolicyStore, models: list[Path], link: RedisLink) -> None:
        self.generators, self.store, self.models = generators, store, models
        self.board = ProgressBoard(link, RunKeys(RUN))
        self.both: list[Replica] = []

    def publish(self, version: VersionId, *, model: int = 0, canaries_of: int | None = None) -> None:
        canaries = make_canaries(self.models[model if canaries_of is None else canaries_of])
        publish_version(self.store, self.models[model], version, canaries=canaries)

    def channel(self) -> grpc.aio.Channel:
        """To both, as an application's."""
        token = read_token(self.generators.root / "run" / "tokens" / "application.token")
        return connect("ipv4:" + ",".join(process.address for process in self.both), token)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def setting(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Setting]:
    root = tmp_path_factory.mktemp("generators")
    server = Server(root / "redis")
    await asyncio.to_thread(server.__enter__)
    async with RedisLink(server.url, retry=RetryPolicy(deadline_s=10)) as link:
        tree = run_tree(root)
        models = [root / "model", make_tiny_model(root / "other", seed=2)]
        store = PolicyStore(root / "run" / "policy", RUN)
        members = Members(link, RunKeys(RUN), GENERATION)
        setting = Setting(Replicas(root, tree, server.url, members, environment()), store, models, link)
        setting.publish(VersionId(0, 0))
        setting.publish(VersionId(1, 1))
        try:
            setting.both = [setting.generators.start(replica) for replica in (0, 1)]
            for process in setting.both:
                await setting.generators.ready(process)
            yield setting
        finally:
            setting.generators.stop()
    server.__exit__()


async def test_they_register_with_what_they_serve(setting: Setting) -> None:
    for process in setting.both:
        member = await setting.generators.ready(process)
        assert (member.version, member.facts["replica"]) == ("1.1", str(process.number))
        assert member.control_address == f"127.0.0.1:{process.control_port}"
    assert len({member.name for member in await setting.generators.members.list()}) == 2


async def test_a_second_process_of_the_same_replica_is_refused_and_harms_nothing(setting: Setting) -> None:
    """H10: it removed the directory of the version that the first one serves."""
    intruder, on_its_port = setting.generators.start(0), setting.generators.start(7, setting.both[0])
    assert await intruder.ended() != 0
    log = intruder.log.read_text()
    assert "generation replica 0 runs already" in log
    assert "HONED_GENERATION__REPLICA" in log
    for process in setting.both:
        versions = setting.generators.root / "run" / "generation" / str(process.number) / "versions"
        assert (versions / "1.1" / "config.json").exists()
    assert await on_its_port.ended() != 0
    assert "is the port taken" in on_its_port.log.read_text()
    assert not (setting.generators.root / "run" / "generation" / "7").exists(), "the ports come before the disk"


async def test_a_version_that_it_was_not_pushed_is_fetched(setting: Setting) -> None:
    """H9: a replica that had missed pushes sampled stale rollouts for ever."""
    setting.publish(VersionId(1, 2), model=1)
    await setting.board.write(LearnerProgress(fence=1, update=2, served=2, version="1.2"))
    for process in setting.both:
        await setting.generators.member(process, lambda m: m.version == "1.2", "it serves 1.2 by itself", 20)


async def test_both_are_replaced_under_load_and_no_request_fails(setting: Setting) -> None:
    """H6: SIGTERM closed the engine at once, and every request in it failed. H5b: one bad version was a total outage."""
    setting.publish(VersionId(1, 3), model=0, canaries_of=1)  # published, and no engine can serve it
    failures: Counter[str] = Counter()
    done: Counter[str] = Counter()
    over = asyncio.Event()
    sampling = common_pb2.SamplingParams(max_tokens=48, fixed_length=True)
    prompt = generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(ids=[10, 20, 30]))

    async with setting.channel() as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)

        async def whole() -> int:
            answer = await stub.Generate(generation_pb2.GenerateRequest(prompt=prompt, sampling=sampling), timeout=60)
            return len(answer.samples[0].token_ids)

        async def streamed() -> int:
            request = generation_pb2.StreamGenerateRequest(prompt=prompt, sampling=sampling)
            return sum([len(part.delta.token_ids) async for part in stub.StreamGenerate(request, timeout=60)])

        async def load(name: str, call: object) -> None:
            while not over.is_set():
                try:
                    assert await call() == 48  # type: ignore[operator]
                    done[name] += 1
                except grpc.aio.AioRpcError as error:
                    failures[f"{name}: {error.code().name} {error.details()}"] += 1

        tasks = [asyncio.create_task(load("whole", whole)) for _ in range(6)]
        tasks += [asyncio.create_task(load("streamed", streamed)) for _ in range(3)]
        try:
            setting.both = await setting.generators.replace_each(setting.both)
        finally:
            over.set()
            await asyncio.gather(*tasks)
    assert failures == {}
    assert min(done["whole"], done["streamed"]) > 10
    first, second = [await setting.generators.ready(process) for process in setting.both]
    assert first.version == second.version == "1.2"
    assert "1.3: " in first.facts["refused"]
    assert "1.3 is refused" in first.facts["alarm"]
    assert list(setting.store.marks.all("quarantined")) == [VersionId(1, 3)]
    assert "refused" not in second.facts, "what the first one has marked is not tried again"
    assert len(await setting.generators.members.list()) == 2, "those that went have left the list"
