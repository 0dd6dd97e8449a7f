"""The rollout worker on a real redis-server, over an engine without a model."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.integration.queue.servers import Server
from tests.support.engine import FakeEngine
from tests.support.run import until

from honed.generation.backoff import Backoff
from honed.generation.frontend import RequestLimits, SamplingFrontend
from honed.generation.gate import RequestGate, RequestKind
from honed.generation.worker import WORKING, RolloutWorker
from honed.kit.errors import DeadlineExceeded, FailedPrecondition, Overloaded, Unavailable
from honed.queue.connection import RedisLink, RetryPolicy
from honed.queue.keys import PROMPTS, ROLLOUTS, RunKeys
from honed.queue.messages import Message
from honed.queue.stats import StageStats
from honed.queue.stream import DeliverySettings, WorkQueue
from honed.v1 import common_pb2

pytestmark = pytest.mark.redis
_RUNS = itertools.count(1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
async def link(server: Server) -> AsyncIterator[RedisLink]:
    async with RedisLink(server.url, retry=RetryPolicy(deadline_s=0.5, cap_s=0.1)) as link:
        yield link


class Rig:
    """A run's queues, one generator, and workers on demand."""

    def __init__(self, link: RedisLink, *, window: int = 8, samples: int = 1) -> None:
        self.link, self.samples = link, samples
        self.keys = RunKeys(f"worker-{next(_RUNS)}")
        self.gate = RequestGate(window, 100, 0.5)
        self.engine = FakeEngine(self.gate)
        self.gate.open()
        limits = RequestLimits(max_samples=4, max_tokens=64, default_max_tokens=8, max_prompt_tokens=20)
        self.frontend = SamplingFrontend(self.engine, self.gate, limits, "r")
        self.other = self.queue("other")
        self.identity: Exception | None = None

    def queue(self, consumer: str, stage: str = PROMPTS, lease_ms: int = 60_000) -> WorkQueue:
        return WorkQueue(self.link, self.keys, stage, consumer, DeliverySettings(lease_ms, max_deliveries=2, sweep_ms=20))

    async def put(self, count: int, **fields: Any) -> None:
        for number in range(count):
            task = common_pb2.PromptTask(
                group_id=f"r-{number}", run="r", samples=self.samples, sampling=common_pb2.SamplingParams(max_tokens=3)
            )
            task.prompt_token_ids.extend(fields.get("prompt", [1, 2]))
            await self.other.put([Message(task.group_id, task.SerializeToString(), "")])

    async def check(self) -> None:
        if self.identity is not None:
            raise self.identity

    @asynccontextmanager
    async def worker(self, *, drain_s: float = 4.0, lease_ms: int = 60_000) -> AsyncIterator[RolloutWorker]:
        """Runs a worker, and stops it as the service does."""
        stopping = asyncio.Event()
        queue = self.queue("w", lease_ms=lease_ms)
        worker = RolloutWorker(self.frontend, queue, self.check, drain_s=drain_s, backoff=Backoff(0.02, 0.1))
        running = asyncio.create_task(worker.run(stopping))
        try:
            async with asyncio.timeout(30):
                yield worker
        finally:
            stopping.set()
            async with asyncio.timeout(10):
                await running

    async def stats(self, stage: str = PROMPTS) -> StageStats:
        return await self.queue("reader", stage).stats()

    async def rollouts(self, count: int) -> list[str]:
        """Waits for so many rollouts."""
        sink, found = self.queue("sink", ROLLOUTS), []
        async with asyncio.timeout(20):
            while len(found) < count:
                found += await sink.take(count - len(found), block_ms=200)
        return sorted(delivery.message.id for delivery in found)


@pytest.fixture
def rig(link: RedisLink) -> Rig:
    return Rig(link)


async def test_a_prompts_rollouts_go_on_together_with_the_version_that_sampled_them(link: RedisLink) -> None:
    rig = Rig(link, samples=16)
    await rig.put(3)
    async with rig.worker():
        assert await rig.rollouts(48) == sorted(f"r-{turn}/{i}" for turn in range(3) for i in range(16))
    assert (await rig.stats()).balance == 0


async def test_training_counts_samples_and_not_prompts(link: RedisLink) -> None:
    rig = Rig(link, window=8, samples=4)
    rig.engine.go_on.clear()
    await rig.put(10)
    async with rig.worker():
        await until(lambda: rig.gate.in_flight_of(RequestKind.TRAINING) >= 8, 60, "the window is full")
        await asyncio.sleep(0.2)
        assert rig.gate.in_flight_of(RequestKind.TRAINING) == 8, "two prompts of four fill the window; no third is taken"
        rig.engine.go_on.set()
        await rig.rollouts(40)


async def test_applications_that_fill_the_engine_leave_no_dead_letter_and_training_advances(link: RedisLink) -> None:
    """C2: with the engine full of applications, prompts became dead letters after five refusals."""
    rig = Rig(link, window=4, samples=2)
    await rig.put(6)
    over = asyncio.Event()

    async def application() -> None:
        while not over.is_set():
            async with rig.gate.enter():
                await asyncio.sleep(0.005)

    crowd = [asyncio.create_task(application()) for _ in range(60)]
    async with rig.worker():
        await rig.rollouts(12)
        assert len([request for request in rig.engine.begun if request.kind is RequestKind.TRAINING]) == 12, "each once"
        over.set()
    await asyncio.gather(*crowd)
    stats = await rig.stats()
    assert (stats.dead, stats.depth) == (0, 0)


async def test_a_worker_whose_work_fails_while_it_is_cancelled_ends(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's death does both at once. A worker that went on kept a process without an engine alive."""
    worker, begun = RolloutWorker(rig.frontend, rig.queue("w"), rig.check, backoff=Backoff(0.02, 0.1)), asyncio.Event()

    async def dies(stopping: asyncio.Event) -> None:
        begun.set()
        try:
            await stopping.wait()
        except asyncio.CancelledError:
            raise ExceptionGroup("of a task group", [Unavailable("the engine died")]) from None

    monkeypatch.setattr(worker, "_work_until", dies)
    running = asyncio.create_task(worker.run(asyncio.Event()))
    await begun.wait()
    running.cancel()
    await asyncio.wait([running], timeout=5)
    assert running.cancelled()


@pytest.mark.parametrize("fault", [Overloaded("full"), Unavailable("the engine restarts")])
async def test_what_the_engine_refuses_for_now_costs_no_delivery(rig: Rig, fault: Exception) -> None:
    rig.engine.fault = fault
    await rig.put(3)
    async with rig.worker():
        await until(lambda: len(rig.engine.begun) > 20, 60, "it was tried many times more than there are deliveries")
        rig.engine.fault = None
        await rig.rollouts(3)
    assert (await rig.stats()).dead == 0


async def test_a_prompt_that_was_not_finished_in_time_is_tried_again_without_end_and_tells_so(rig: Rig) -> None:
    """Five tries over the engine's time made a dead letter of each prompt whose response takes longer than that."""
    rig.engine.fault = DeadlineExceeded("the engine did not finish within 600 s")
    await rig.put(1)
    async with rig.worker() as worker:
        assert worker.late == ""
        await until(lambda: len(rig.engine.begun) == 4, 60, "it was tried more often than there are deliveries")
        assert worker.late == "training prompt r-0 goes back to the queue: the engine did not finish within 600 s"
        rig.engine.fault = None
        await rig.rollouts(1)
        worker._late_shown_s = 0.0
        assert worker.late == ""
    assert (await rig.stats()).dead == 0


async def test_a_prompt_that_no_engine_takes_is_a_dead_letter_at_once(rig: Rig) -> None:
    await rig.put(1, prompt=[1] * 21)
    async with rig.worker():
        await until(lambda: _dead(rig), 60, "a dead letter")
    assert rig.engine.begun == []


async def _dead(rig: Rig) -> bool:
    return (await rig.stats()).dead == 1


async def test_a_prompt_on_which_the_worker_stumbles_is_a_dead_letter_in_the_end_and_stops_no_other(rig: Rig) -> None:
    rig.engine.fault = RuntimeError("a bug")
    await rig.put(1)
    async with rig.worker():
        await until(lambda: _dead(rig), 60, "a dead letter")
        rig.engine.fault = None
        await rig.put(1)
        await rig.rollouts(1)


async def test_a_stop_finishes_what_is_in_hand_and_hands_it_on(rig: Rig) -> None:
    """L14: what was finished and not handed on was lost until its lease ran out."""
    rig.engine.go_on.clear()
    await rig.put(3)
    async with rig.worker():
        await until(lambda: len(rig.engine.begun) == 3, 60, "all are in the engine")
        asyncio.get_running_loop().call_later(0.1, rig.engine.go_on.set)
    assert await rig.rollouts(3) == ["r-0/0", "r-1/0", "r-2/0"]
    assert (await rig.stats()).depth == 0


async def test_a_stop_gives_back_what_the_drain_has_no_time_for(rig: Rig) -> None:
    rig.engine.go_on.clear()
    await rig.put(3)
    async with rig.worker(drain_s=2.1):
        await until(lambda: len(rig.engine.begun) == 3, 60, "all are in the engine")
    assert len(rig.engine.cancelled) == 3
    taken = await rig.other.take(3)
    assert [delivery.count for delivery in taken] == [1, 1, 1], "at once, and no delivery is counted"


async def test_work_on_prompts_that_others_took_over_is_cancelled(rig: Rig) -> None:
    """L7: the sampling of a lost prompt went on to its end, for nothing."""
    rig.engine.go_on.clear()
    await rig.put(1)
    async with rig.worker(lease_ms=600):
        await until(lambda: rig.engine.begun, 60, "it is in the engine")
        stream = rig.keys.stream(PROMPTS)
        entry = (await link_range(rig.link, stream))[0]
        await rig.link.redis.xclaim(stream, "workers", "thief", 0, [entry], justid=True)
        await until(lambda: rig.engine.cancelled, 60, "it is cancelled")


async def link_range(link: RedisLink, stream: str) -> list[bytes]:
    return [entry for entry, _ in await link.redis.xrange(stream)]


async def test_while_it_may_not_work_it_takes_nothing_and_says_why(rig: Rig) -> None:
    """M3: a generator of another run of the same name sampled this one's prompts."""
    rig.identity = FailedPrecondition("two runs have the name 'r'")
    await rig.put(1)
    async with rig.worker() as worker:
        await until(lambda: "two runs" in worker.state, 60, "it says so")
        assert (await rig.stats()).pending == 0
        rig.identity = None
        await rig.rollouts(1)


async def test_one_that_is_behind_or_drains_takes_nothing(rig: Rig) -> None:
    rig.frontend.draining = True
    await rig.put(1)
    async with rig.worker() as worker:
        worker.allowed.clear()
        await until(lambda: "waiting" in worker.state, 60, "it waits")
        worker.allowed.set()
        await until(lambda: worker.state == "draining", 60, "it drains")
        assert rig.engine.begun == []
        rig.frontend.draining = False
        await rig.rollouts(1)


async def test_a_redis_that_is_away_stops_training_work_and_nothing_else(rig: Rig, server: Server) -> None:
    """H7: the process ended, and every request in it."""
    async with rig.worker() as worker:
        await rig.put(1)
        await rig.rollouts(1)
        server.kill()
        try:
            await until(lambda: "Redis" in worker.state, 60, "it says that Redis is away")
            async with rig.gate.enter():
                pass  # applications pass
        finally:
            await asyncio.to_thread(server.start)
        await rig.put(2)
        await until(lambda: worker.state == WORKING, 60, "it works again")
        await rig.rollouts(2)
