"""The reward process as the launcher runs it: killed in the middle of its work, stopped by SIGTERM, started again."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.integration.queue.servers import Server
from tests.integration.reward.test_worker import rollout
from tests.support.tiny import make_tiny_model, publish_version
from tests.unit.reward.support import make_reward_model

from honed.artifacts import PolicyStore, VersionId
from honed.kit.channel import connect
from honed.kit.tokens import read_token
from honed.queue.connection import Link
from honed.queue.embedded import free_port
from honed.queue.keys import ROLLOUTS, SCORED, RunKeys
from honed.queue.stream import WorkQueue
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
    """A run file for one reward service, and processes that serve it."""

    def __init__(self, directory: Path, keys: RunKeys, redis_url: str) -> None:
        self.directory = directory
        self.port, self.health_port = free_port(), free_port()
        self.model = make_reward_model(directory / "models" / "a", seed=1)
        make_reward_model(directory / "models" / "b", seed=2)
        publish_version(PolicyStore(directory / "policy", keys.run), make_tiny_model(directory / "base", 3), VersionId(0, 0))
        tree = {
            "run": keys.run,
            "directory": str(directory),
            "queue": {"lease_s": 1.0},
            "reward": {
                "scorers": [{"name": "rm", "kind": "reward_model", "source": str(self.model)}],
                "port": self.port,
                "health_port": self.health_port,
            },
        }
        self.file = directory / "run.yaml"
        self.file.write_text(yaml.safe_dump(tree))
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", "HONED_QUEUE__URL": redis_url, "HF_HUB_OFFLINE": "1"}

    @asynccontextmanager
    async def process(self) -> AsyncIterator[asyncio.subprocess.Process]:
        """A ready service; killed at the end if it still runs."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", PROGRAM, str(self.file), env=self._environment, stderr=asyncio.subprocess.DEVNULL
        )
        try:
            await self._ready(process)
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def _ready(self, process: asyncio.subprocess.Process) -> None:
        async with connect(f"127.0.0.1:{self.health_port}") as channel, asyncio.timeout(90):
            stub = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service="honed.v1.RewardService")
            call = stub.Watch(request, wait_for_ready=True)
            async for answer in call:
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
        raise AssertionError(f"the service ended: {process.returncode}")

    @asynccontextmanager
    async def stub(self) -> AsyncIterator[Any]:
        token = read_token(self.directory / "tokens" / "operator.token")
        async with connect(f"127.0.0.1:{self.port}", token) as channel:
            yield reward_pb2_grpc.RewardServiceStub(channel)


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
    run: Run, link: Link, keys: RunKeys
) -> None:
    total = 3000
    source, sink = WorkQueue(link, keys, ROLLOUTS, "test"), WorkQueue(link, keys, SCORED, "learner")
    question = reward_pb2.ScoreRequest(items=[reward_pb2.ScoreItem(id="x", text="words")])
    async with run.process() as first, run.stub() as stub:
        before = (await stub.Score(question, timeout=20)).results[0]
        other = reward_pb2.LoadScorerRequest(name="rm", source=str(run.directory / "models" / "b"))
        version = (await stub.LoadScorer(other, timeout=30)).scorer.version
        promotion = reward_pb2.PromoteScorerRequest(name="rm", version=version)
        assert (await stub.PromoteScorer(promotion, timeout=10)).previous_version == before.scores[0].scorer_version
        promoted = (await stub.Score(question, timeout=20)).results[0]
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
    done: list[common_pb2.ScoredRollout] = []
    async with run.process() as second, run.stub() as stub, asyncio.timeout(60):
        again = (await stub.Score(question, timeout=20)).results[0]
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
