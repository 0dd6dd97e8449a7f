"""The reward process as the launcher runs it: killed in the middle of its work, stopped by SIGTERM, started again."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.integration.queue.servers import Server
from tests.integration.reward.test_worker import rollout
from tests.support.tiny import make_tiny_model, publish_version
from tests.unit.reward.support import make_reward_model

from honed.artifacts.manifest import Lineage
from honed.artifacts.promotions import PromotionRecord
from honed.artifacts.reward_models import RewardModelStore
from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.conductor.roster import Roster
from honed.kit.channel import connect
from honed.kit.tokens import read_token
from honed.queue.connection import RedisLink
from honed.queue.embedded import free_port
from honed.queue.keys import ROLLOUTS, SCORED, RunKeys
from honed.queue.members import REWARD, Members
from honed.queue.stream import WorkQueue
from honed.settings_file import load_settings
from honed.v1 import common_pb2, reward_pb2, reward_pb2_grpc

pytestmark = pytest.mark.redis

PROGRAM = """
import asyncio, sys
from pathlib import Path
from honed.reward.main import run
from honed.settings_file import load_settings
asyncio.run(run(load_settings(Path(sys.argv[1]))))
"""


class Run:
    """A run file for one reward service, and processes that serve it: replicas with ports of their own."""

    def __init__(self, directory: Path, keys: RunKeys, redis_url: str, source: str | None = None) -> None:
        self.directory = directory
        self.model = make_reward_model(directory / "models" / "a", seed=1)
        make_reward_model(directory / "models" / "b", seed=2)
        self.store = str(directory / "policy")
        publish_version(PolicyStore(directory / "policy", keys.run), make_tiny_model(directory / "base", 3), VersionId(0, 0))
        tree = {
            "run": keys.run,
            "directory": str(directory),
            "queue": {"lease_s": 1.0},
            "reward": {"scorers": [{"name": "rm", "kind": "reward_model", "source": source or str(self.model)}]},
        }
        self.file = directory / "run.yaml"
        self.file.write_text(yaml.safe_dump(tree))
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", "HONED_QUEUE__URL": redis_url, "HF_HUB_OFFLINE": "1"}

    def change(self, sections: Mapping[str, object], installed: Path) -> None:
        """Changes the run file, and adds a directory of packages to those that replicas find."""
        self.file.write_text(yaml.safe_dump({**yaml.safe_load(self.file.read_text()), **sections}))
        self._environment["PYTHONPATH"] = f"{installed}:{self._environment.get('PYTHONPATH', '')}"

    def replica(self, number: int = 0) -> Replica:
        return Replica(self, number)

    def environment(self, **variables: object) -> dict[str, str]:
        return {**self._environment, **{f"HONED_REWARD__{name.upper()}": str(value) for name, value in variables.items()}}


class Replica:
    """One process of a run's reward service."""

    def __init__(self, run: Run, number: int) -> None:
        self._run, self._number = run, number
        self.port, self.health_port = free_port(), free_port()

    @asynccontextmanager
    async def process(self, *, ready: bool = True) -> AsyncIterator[asyncio.subprocess.Process]:
        """The process, ready if not told otherwise; killed at the end if it still runs."""
        environment = self._run.environment(port=self.port, health_port=self.health_port, replica=self._number)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", PROGRAM, str(self._run.file), env=environment, stderr=asyncio.subprocess.DEVNULL
        )
        try:
            if ready:
                await self.until(serving=True)
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def until(self, *, serving: bool) -> None:
        """Waits until the health service says so."""
        wanted = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        async with connect(f"127.0.0.1:{self.health_port}") as channel, asyncio.timeout(90):
            stub = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service="honed.v1.RewardService")
            async for answer in stub.Watch(request, wait_for_ready=True):
                if answer.status == wanted:
                    return
        raise AssertionError("the service ended")

    @asynccontextmanager
    async def stub(self) -> AsyncIterator[Any]:
        token = read_token(self._run.directory / "tokens" / "operator.token")
        async with connect(f"127.0.0.1:{self.port}", token) as channel:
            yield reward_pb2_grpc.RewardServiceStub(channel)


QUESTION = reward_pb2.ScoreRequest(items=[reward_pb2.ScoreItem(id="x", text="words")])


async def scored_by(stub: Any) -> str:
    """The version that serves."""
    answer = await stub.Score(QUESTION, timeout=20)
    version: str = answer.results[0].scores[0].scorer_version
    return version


async def load(stub: Any, source: Path | str) -> str:
    """Loads a version; its name."""
    answer = await stub.LoadScorer(reward_pb2.LoadScorerRequest(name="rm", source=str(source)), timeout=60)
    version: str = answer.scorer.version
    return version


async def promote(stub: Any, version: str) -> reward_pb2.PromoteScorerResponse:
    answer: reward_pb2.PromoteScorerResponse = await stub.PromoteScorer(
        reward_pb2.PromoteScorerRequest(name="rm", version=version), timeout=90
    )
    return answer


@pytest.fixture
def run(tmp_path: Path, keys: RunKeys, redis_server: Server) -> Run:
    return Run(tmp_path, keys, redis_server.url)


async def _stop_with_work_in_hand(process: asyncio.subprocess.Process, source: WorkQueue) -> None:
    """Freezes the process between a take and the hand-on of what it took; a kill alone may fall between two takes."""
    while True:
        process.send_signal(signal.SIGSTOP)
        await source.stats()  # Redis carries out what the process had sent before it answers a second question
        if (await source.stats()).pending > 0:
            return
        process.send_signal(signal.SIGCONT)
        await asyncio.sleep(0.003)


async def test_a_killed_service_comes_back_with_the_promoted_model_and_scores_each_rollout_once(
    run: Run, link: RedisLink, keys: RunKeys
) -> None:
    total = 3000
    source, sink = WorkQueue(link, keys, ROLLOUTS, "test"), WorkQueue(link, keys, SCORED, "learner")
    replica = run.replica()
    async with replica.process() as first, replica.stub() as stub:
        before = (await stub.Score(QUESTION, timeout=20)).results[0]
        version = await load(stub, run.directory / "models" / "b")
        answer = await promote(stub, version)
        assert (answer.previous_version, answer.replicas) == (before.scores[0].scorer_version, 1)
        promoted = (await stub.Score(QUESTION, timeout=20)).results[0]
        assert promoted.reward != before.reward
        await source.put([rollout(i) for i in range(total)])
        async with asyncio.timeout(60):
            while await sink.depth() == 0:
                await asyncio.sleep(0.001)
            await _stop_with_work_in_hand(first, source)
        first.send_signal(signal.SIGKILL)
        await first.wait()
    stats = await source.stats()
    assert stats.pending > 0, "it was killed with work in its hands"
    shutil.rmtree(run.directory / "models" / "b")  # what was promoted does not depend on the path that was loaded
    done: list[common_pb2.ScoredRollout] = []
    async with replica.process() as second, replica.stub() as stub, asyncio.timeout(60):
        again = (await stub.Score(QUESTION, timeout=20)).results[0]
        assert again.scores[0].scorer_version == version
        assert again.reward == pytest.approx(promoted.reward, abs=1e-5)  # a batch's company moves the last bits
        while len(done) < total:
            done += [common_pb2.ScoredRollout.FromString(d.message.body) for d in await sink.take(500, block_ms=1000)]
        second.send_signal(signal.SIGTERM)
        assert await second.wait() == 0
    assert sorted(int(scored.rollout.group_id) for scored in done) == list(range(total))
    assert {scored.scores[0].scorer_version for scored in done} == {version}
    stats = await source.stats()
    assert (stats.handed_on, stats.depth, stats.dead, stats.balance) == (total, 0, 0, 0)
    assert await sink.take(1) == []
    assert await Members(link, keys, REWARD).list() == [], "it took itself off the list"


async def test_replicas_promote_together_whatever_dies_in_between(run: Run, link: RedisLink, keys: RunKeys) -> None:
    a, b, c = (run.replica(number) for number in range(3))
    async with a.process() as process, b.process(), a.stub() as to_a, b.stub() as to_b:
        first = await scored_by(to_a)
        second = await load(to_a, run.directory / "models" / "b")
        answer = await promote(to_b, second)
        assert (answer.previous_version, answer.replicas) == (first, 2)
        assert {await scored_by(to_a), await scored_by(to_b)} == {second}
        async with asyncio.timeout(20):
            members = Members(link, keys, REWARD)
            while [member.facts["scorer:rm"] for member in await members.list()] != [second, second]:
                await asyncio.sleep(0.02)
        # Both promote at the same time: one after the other, and the last one stands everywhere.
        answers = await asyncio.gather(promote(to_a, first), promote(to_b, second))
        assert {answer.serving.version for answer in answers} == {first, second}
        last = PromotionRecord(run.store, keys.run).read().versions["rm"]
        async with asyncio.timeout(20):
            while {await scored_by(to_a), await scored_by(to_b)} != {last}:
                await asyncio.sleep(0.05)
        # One is killed and has not left the list yet: the promotion waits for its lease, no longer.
        process.send_signal(signal.SIGKILL)
        await process.wait()
        target = first if last == second else second
        assert (await promote(to_b, target)).replicas == 1
        async with c.process(), c.stub() as to_c:
            assert await scored_by(to_c) == target, "a newcomer serves it from its first answer on"


async def test_the_endpoint_serves_on_without_redis_and_scoring_goes_on_when_it_is_back(
    run: Run, redis_server: Server, keys: RunKeys
) -> None:
    replica = run.replica()
    async with replica.process() as process, replica.stub() as stub:
        await scored_by(stub)
        await asyncio.to_thread(redis_server.kill)
        try:
            version = await scored_by(stub)
            with pytest.raises(grpc.aio.AioRpcError, match="Redis at") as caught:
                await promote(stub, version)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            other = run.replica(1)
            async with other.process(), other.stub() as to_other:  # starts too
                assert await scored_by(to_other) == version
        finally:
            await asyncio.to_thread(redis_server.start)
        async with RedisLink(redis_server.url) as link, asyncio.timeout(60):
            source, sink = WorkQueue(link, keys, ROLLOUTS, "test"), WorkQueue(link, keys, SCORED, "learner")
            await source.put([rollout(i) for i in range(5)])
            while await sink.depth() < 5:
                await asyncio.sleep(0.01)
        assert process.returncode is None


async def test_a_users_function_that_answers_nan_is_an_alarm_that_the_conductor_shows(
    run: Run, redis_server: Server, link: RedisLink, keys: RunKeys
) -> None:
    installed = run.directory / "packages"
    (installed / "mine-1.dist-info").mkdir(parents=True)
    (installed / "mine.py").write_text("def tone(samples):\n    return [float('nan')] * len(samples)\n")
    (installed / "mine-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    (installed / "mine-1.dist-info" / "entry_points.txt").write_text("[honed.scorers]\ntone = mine:tone\n")
    run.change({"reward": {"scorers": [{"name": "polite", "kind": "function", "source": "tone"}]}}, installed)
    await WorkQueue(link, keys, ROLLOUTS, "test").put([rollout(i) for i in range(5)])
    fleet: Any = SimpleNamespace(redis_url=redis_server.url)
    roster = Roster(load_settings(run.file), fleet)
    async with run.replica().process(), roster.running(), asyncio.timeout(60):
        while not roster.alarms:
            await asyncio.sleep(0.05)
    [alarm] = roster.alarms
    assert alarm.startswith("reward-")
    assert "scorer 'polite' (mine 1) failed: it returned nan, which is not finite" in alarm
    assert roster.broken == "", "a minute has not passed"


async def test_a_service_without_its_reward_model_waits_alive_and_not_ready(
    tmp_path: Path, keys: RunKeys, redis_server: Server
) -> None:
    run = Run(tmp_path, keys, redis_server.url, source="trained")
    replica = run.replica()
    async with replica.process(ready=False) as process:
        await replica.until(serving=False)
        async with RedisLink(redis_server.url) as link, asyncio.timeout(20):
            while not (found := await Members(link, keys, REWARD).list()):
                await asyncio.sleep(0.05)
        assert not found[0].ready
        async with replica.stub() as stub:
            with pytest.raises(grpc.aio.AioRpcError, match="still being loaded") as caught:
                await stub.Score(QUESTION, timeout=20)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert process.returncode is None
        RewardModelStore(run.store, keys.run, "trained").publish_next(run.model, Lineage())
        await replica.until(serving=True)
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
