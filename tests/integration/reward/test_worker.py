"""The scoring worker on a real redis-server."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent import futures
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from tests.integration.queue.servers import Server
from tests.unit.reward.support import TOKENIZER, FakeScorer

from honed.queue.connection import RedisLink, RetryPolicy
from honed.queue.dead import DeadLetters
from honed.queue.identity import RunIdentity
from honed.queue.keys import ROLLOUTS, SCORED, RunKeys
from honed.queue.messages import Delivery, Message
from honed.queue.stream import DeliverySettings, WorkQueue
from honed.reward import metrics
from honed.reward.batching import BatchSettings, DynamicBatcher
from honed.reward.function_scorer import FunctionScorer, find_function
from honed.reward.remote_scorer import RemoteScorer
from honed.reward.reward import Term, WeightedSum
from honed.reward.scorer import Scorer
from honed.reward.settings import RemoteOptions
from honed.reward.trouble import Trouble
from honed.reward.worker import ScoringWorker
from honed.v1 import common_pb2, reward_pb2

pytestmark = pytest.mark.redis


def rollout(index: int, response: str | None = None) -> Message:
    body = common_pb2.Rollout(
        rollout_id=f"{index}/0",
        group_id=str(index),
        run="r",
        prompt_token_ids=b"p",
        response_token_ids=(response or str(index)).encode(),
        logprobs=[-0.5] * 3,
        reference=f"reference of {index}",
    )
    return Message(body.rollout_id, body.SerializeToString(), trace_of(index))


def trace_of(index: int) -> str:
    return f"00-{index + 1:032x}-{index + 1:016x}-01"


class Rig:
    """A run's queues, and workers on demand."""

    def __init__(self, link: RedisLink, keys: RunKeys) -> None:
        self.link, self.keys = link, keys
        self.dead = DeadLetters(link, keys, ROLLOUTS)
        self.source = self.queue("test", ROLLOUTS)
        self.sink = self.queue("learner", SCORED)
        self.pauses: list[float] = []

    async def pause(self, seconds: float) -> None:
        """A worker's rest, which takes no time worth waiting for."""
        self.pauses.append(seconds)
        await asyncio.sleep(0.002)

    def queue(self, consumer: str, stage: str, lease_ms: int = 60_000, sweep_ms: int = 20) -> WorkQueue:
        settings = DeliverySettings(lease_ms, max_deliveries=2, sweep_ms=sweep_ms)
        return WorkQueue(self.link, self.keys, stage, consumer, settings)

    @asynccontextmanager
    async def worker(
        self,
        scorer: Scorer,
        consumer: str = "w",
        lease_ms: int = 60_000,
        check_run: Callable[[], Awaitable[None]] | None = None,
        sweep_ms: int = 20,
        trouble: Trouble | None = None,
    ) -> AsyncIterator[asyncio.Task[None]]:
        """Runs a worker, and stops it as the service does."""
        stopping = asyncio.Event()
        batcher = DynamicBatcher(lambda: WeightedSum([Term(scorer, 2.0)]), BatchSettings(64, 0.001, 128))
        async with batcher.running(), asyncio.timeout(60):
            queue = self.queue(consumer, ROLLOUTS, lease_ms, sweep_ms)
            worker = ScoringWorker(queue, batcher, TOKENIZER, 16, check_run, self.pause, trouble)
            task = asyncio.ensure_future(worker.run(stopping))
            yield task
            stopping.set()
            if isinstance(scorer, FakeScorer):
                scorer.gate.set()
            await task

    async def scored(self, count: int) -> list[tuple[Delivery, common_pb2.ScoredRollout]]:
        """Waits for so many scored rollouts."""
        found: list[Delivery] = []
        async with asyncio.timeout(30):
            while len(found) < count:
                found += await self.sink.take(count - len(found), block_ms=500)
        return [(d, common_pb2.ScoredRollout.FromString(d.message.body)) for d in found]

    async def dead_letters(self, count: int) -> list[str]:
        """Waits for so many dead letters; their reasons."""
        async with asyncio.timeout(30):
            while (await self.source.stats()).dead < count:
                await asyncio.sleep(0.01)
        letters = await self.dead.list(limit=count)
        return [letter.death.reason for letter in letters]


@pytest.fixture
def rig(link: RedisLink, keys: RunKeys) -> Rig:
    return Rig(link, keys)


async def test_a_rollout_comes_out_unchanged_with_its_reward_and_each_scorers_version(rig: Rig) -> None:
    await rig.source.put([rollout(i) for i in range(100)])
    async with rig.worker(FakeScorer(version="v7")):
        done = await rig.scored(100)
    for delivery, scored in done:
        index = int(scored.rollout.group_id)
        assert scored.rollout == common_pb2.Rollout.FromString(rollout(index).body)
        assert scored.reward == 2.0 * index
        assert list(scored.scores) == [common_pb2.Score(scorer="fake", scorer_version="v7", value=index, weight=2.0)]
        assert (delivery.message.id, delivery.message.traceparent) == (f"{index}/0", trace_of(index))
    assert {int(scored.rollout.group_id) for _, scored in done} == set(range(100))
    stats = await rig.source.stats()
    assert (stats.handed_on, stats.depth, stats.balance) == (100, 0, 0)


async def test_a_rollout_without_the_reference_that_its_scorer_needs_is_a_dead_letter_at_once(rig: Rig) -> None:
    """Nothing was scored before, so that a scorer that does not work at all could not be told from this otherwise."""
    bare = common_pb2.Rollout.FromString(rollout(7).body)
    bare.reference = ""
    right = common_pb2.Rollout.FromString(rollout(8).body)
    right.reference = "8"
    await rig.source.put([Message(each.rollout_id, each.SerializeToString(), trace_of(0)) for each in (bare, right)])
    async with rig.worker(find_function("answer", "exact_match")):
        [reason] = await rig.dead_letters(1)
        assert "reference: is empty: give the prompt a `reference`" in reason
        [(_, scored)] = await rig.scored(1)
    assert (scored.rollout.rollout_id, scored.reward) == ("8/0", 2.0)
    assert rig.pauses == [], "the scorer works"


async def test_a_worker_that_had_nothing_to_score_yet_shows_that_it_works(rig: Rig) -> None:
    metrics.WORKING.set(0)
    async with rig.worker(FakeScorer()) as running:
        async with asyncio.timeout(30):
            while not metrics.WORKING._value.get():
                await asyncio.sleep(0.01)
        assert not running.done()


async def test_what_cannot_be_scored_goes_to_the_dead_letters_with_the_reason_and_its_neighbours_go_on(rig: Rig) -> None:
    scorer = FakeScorer()
    await rig.source.put([rollout(1), rollout(2, "raise"), rollout(3)])
    async with rig.worker(scorer, lease_ms=1100):  # a failed one rests for a second
        scored = await rig.scored(2)
        [reason] = await rig.dead_letters(1)
    assert sorted(s.reward for _, s in scored) == [2.0, 6.0]
    assert reason == "scorer 'fake' (v1) failed: ValueError: told to"
    assert sum(batch.count("raise") for batch in scorer.batches) >= 2, "it was delivered again first"
    assert (await rig.source.stats()).balance == 0


async def test_an_entry_that_is_no_rollout_is_a_dead_letter_at_once(rig: Rig) -> None:
    await rig.source.put([Message("x", b"\xff\xff"), Message("y", b""), rollout(1)])
    async with rig.worker(FakeScorer()):
        await rig.scored(1)
        reasons = await rig.dead_letters(2)
    assert all(reason.startswith("no honed.v1.Rollout: ") for reason in reasons)


async def test_a_slow_scorer_keeps_its_lease_and_takes_no_more_than_it_can_chew(rig: Rig) -> None:
    scorer = FakeScorer()
    scorer.gate.clear()
    await rig.source.put([rollout(i) for i in range(100)])
    async with rig.worker(scorer, lease_ms=300):
        assert await asyncio.to_thread(scorer.entered.wait, 10)
        rival = rig.queue("rival", ROLLOUTS, lease_ms=300)
        await asyncio.sleep(0.9)  # three leases
        taken = await rival.take(100)
        assert len(taken) == 100 - 2 * 16, "two groups of 16 are the worker's, and stay so"
        assert all(delivery.count == 1 for delivery in taken)
        await rival.release(taken)
        scorer.gate.set()
        await rig.scored(100)


async def test_a_worker_whose_entries_were_taken_over_adds_nothing(rig: Rig) -> None:
    slow = FakeScorer(version="slow")
    slow.gate.clear()
    await rig.source.put([rollout(i) for i in range(10)])
    async with rig.worker(slow, "slow", sweep_ms=3_600_000):  # it must not take over its own entries
        assert await asyncio.to_thread(slow.entered.wait, 10)
        pending = await rig.link.redis.xpending_range(rig.keys.stream(ROLLOUTS), "workers", "-", "+", 10)
        await rig.link.redis.xclaim(
            rig.keys.stream(ROLLOUTS), "workers", "slow", 0, [p["message_id"] for p in pending], idle=3_600_000, justid=True
        )
        async with rig.worker(FakeScorer(version="quick"), "quick"):
            done = await rig.scored(10)
        slow.gate.set()
    assert {s.scores[0].scorer_version for _, s in done} == {"quick"}
    assert await rig.sink.depth() == 10
    assert (await rig.source.stats()).handed_on == 10


async def test_a_stop_ends_what_is_in_hand_and_leaves_the_rest(rig: Rig) -> None:
    scorer = FakeScorer()
    scorer.gate.clear()
    await rig.source.put([rollout(i) for i in range(100)])
    async with rig.worker(scorer):
        assert await asyncio.to_thread(scorer.entered.wait, 10)
    stats = await rig.source.stats()
    assert stats.pending == 0
    assert stats.waiting + stats.handed_on == 100
    assert 0 < stats.handed_on <= 32
    assert await rig.sink.depth() == stats.handed_on


async def test_a_redis_that_dies_in_the_middle_is_ridden_out(redis_server: Server, rig: Rig) -> None:
    scorer = FakeScorer()
    await rig.source.put([rollout(i) for i in range(500)])
    async with rig.worker(scorer):
        assert await asyncio.to_thread(scorer.entered.wait, 10)
        await asyncio.to_thread(redis_server.kill)
        await asyncio.to_thread(redis_server.start)
        ids = [scored.rollout.rollout_id for _, scored in await rig.scored(500)]
    assert sorted(ids) == sorted(f"{i}/0" for i in range(500))
    assert (await rig.source.stats()).balance == 0


class Outage:
    """A scorer's value that fails for everything while it is away, and always for one response."""

    def __init__(self, error: Exception, poison: str = "13") -> None:
        self.error, self.poison, self.away, self.refused = error, poison, True, 0

    def __call__(self, text: str) -> float:
        if self.away:
            self.refused += 1
            raise self.error
        if text == self.poison:
            raise ValueError("this one never")
        return float(text)


@pytest.mark.parametrize("error", [ConnectionError("away"), RuntimeError("out of memory"), TimeoutError("late")])
@pytest.mark.parametrize("before", [0, 5])
async def test_a_scorer_that_is_away_costs_no_rollout_a_delivery(rig: Rig, error: Exception, before: int) -> None:
    outage = Outage(error)
    outage.away = False
    scorer = FakeScorer(value=outage)
    async with rig.worker(scorer):
        await rig.source.put([rollout(100 + i) for i in range(before)])
        await rig.scored(before)
        outage.away = True
        await rig.source.put([rollout(i) for i in range(30)])
        async with asyncio.timeout(30):
            while len(rig.pauses) < 8:  # max_deliveries is 2
                await asyncio.sleep(0.005)
        stats = await rig.source.stats()
        assert (stats.dead, stats.depth, stats.handed_on) == (0, 30, before)
        outage.away = False
        scored = await rig.scored(29)
        [reason] = await rig.dead_letters(1)
    assert {int(s.rollout.group_id) for _, s in scored} == set(range(30)) - {13}
    assert reason == "scorer 'fake' (v1) failed: ValueError: this one never", "the one that the scorer itself refuses"
    assert rig.pauses[:6] == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0]
    assert max(rig.pauses) == 5.0


@pytest.mark.parametrize(
    ("value", "reason"),
    [(float("nan"), "it returned nan, which is not finite"), ([1.0], r"it returned [1.0], which is no number")],
)
async def test_a_scorer_whose_answers_are_no_scores_is_an_alarm_until_it_is_mended(rig: Rig, value: Any, reason: str) -> None:
    answers = [value]
    now, trouble = [0.0], Trouble(lambda: now[0])
    await rig.source.put([rollout(i) for i in range(20)])
    async with rig.worker(FunctionScorer("odd", lambda samples: answers * len(samples), "1"), trouble=trouble):
        async with asyncio.timeout(30):
            while len(rig.pauses) < 4:
                await asyncio.sleep(0.005)
            assert trouble.alarm.startswith(f"scorer 'odd' (1) failed: {reason}")
            assert trouble.broken == ""
            now[0] = 61.0
            while not trouble.broken:
                await asyncio.sleep(0.005)
        stats = await rig.source.stats()
        assert (stats.dead, stats.depth, stats.handed_on) == (0, 20, 0)
        answers[0] = 1.0
        await rig.scored(20)
        assert trouble.facts() == {}


async def test_a_remote_scorer_that_is_away_costs_no_rollout_a_delivery(rig: Rig) -> None:
    def scored(request: reward_pb2.ScoreRequest, context: grpc.ServicerContext) -> reward_pb2.ScoreResponse:
        return reward_pb2.ScoreResponse(results=[{"id": item.id, "reward": float(item.text)} for item in request.items])

    handler = grpc.unary_unary_rpc_method_handler(scored, reward_pb2.ScoreRequest.FromString, lambda m: m.SerializeToString())
    service = grpc.method_handlers_generic_handler("honed.v1.RewardService", {"Score": handler})
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{reserved.getsockname()[1]}"
        async with rig.worker(RemoteScorer("there", target, RemoteOptions(deadline_s=0.2))):
            await rig.source.put([rollout(i) for i in range(20)])
            async with asyncio.timeout(30):
                while len(rig.pauses) < 4:  # max_deliveries is 2
                    await asyncio.sleep(0.005)
            server = grpc.server(futures.ThreadPoolExecutor(1), handlers=[service])
            server.add_insecure_port(target)
            server.start()
            done = await rig.scored(20)
            server.stop(0).wait()
    assert {(s.rollout.group_id, s.reward) for _, s in done} == {(str(i), 2.0 * i) for i in range(20)}
    assert (await rig.source.stats()).dead == 0


async def test_a_rollout_that_fails_alone_is_told_from_an_outage_by_one_that_scored_before(rig: Rig) -> None:
    outage = Outage(ConnectionError("away"))
    outage.away = False
    async with rig.worker(FakeScorer(value=outage), lease_ms=1100):
        await rig.source.put([rollout(1)])
        await rig.scored(1)
        await rig.source.put([rollout(13)])
        [reason] = await rig.dead_letters(1)
    assert reason.endswith("this one never")
    assert rig.pauses == []


async def test_a_worker_that_meets_nothing_but_bad_rollouts_buries_them(rig: Rig) -> None:
    """As after a restart beside a queue whose good ones have gone on: nothing has scored in this process yet."""

    def value(text: str) -> float:
        if text == "13":
            raise ValueError("this one never")
        return float(len(text))

    async with rig.worker(FakeScorer(value=value), lease_ms=1100):
        await rig.source.put([rollout(13)])
        [reason] = await rig.dead_letters(1)
    assert reason.endswith("this one never")
    assert rig.pauses == []


async def test_an_outage_of_the_scorer_is_asked_once_for_a_batch_not_for_each_rollout(rig: Rig) -> None:
    outage = Outage(ConnectionError("away"))
    scorer = FakeScorer(value=outage)
    await rig.source.put([rollout(i) for i in range(16)])
    async with rig.worker(scorer):
        async with asyncio.timeout(30):
            while not rig.pauses:
                await asyncio.sleep(0.002)
        tried = [len(batch) for batch in scorer.batches]
        outage.away = False
        await rig.scored(15)
    assert tried
    assert min(tried) > 1


async def test_rollouts_of_another_run_of_the_same_name_are_left_alone(rig: Rig) -> None:
    identity = RunIdentity(rig.link, rig.keys)
    await identity.check("theirs")
    await rig.source.put([rollout(1)])
    async with rig.worker(FakeScorer(), check_run=lambda: identity.check("ours")):
        async with asyncio.timeout(20):
            while len(rig.pauses) < 3:
                await asyncio.sleep(0.002)
        assert (await rig.source.stats()).waiting == 1
        await rig.link.redis.delete(rig.keys.identity())
        await rig.scored(1)


async def test_an_outage_of_redis_longer_than_the_link_waits_does_not_end_the_worker(
    redis_server: Server, keys: RunKeys
) -> None:
    async with RedisLink(redis_server.url, retry=RetryPolicy(deadline_s=0.05, first_s=0.01)) as link:
        rig = Rig(link, keys)
        scorer = FakeScorer()
        async with rig.worker(scorer) as task:
            await rig.source.put([rollout(i) for i in range(5)])
            await rig.scored(5)
            scorer.gate.clear()
            scorer.entered.clear()
            await rig.source.put([rollout(10 + i) for i in range(20)])
            assert await asyncio.to_thread(scorer.entered.wait, 10)
            await asyncio.to_thread(redis_server.kill)
            scorer.gate.set()
            async with asyncio.timeout(30):
                while len(rig.pauses) < 3:
                    await asyncio.sleep(0.01)
            assert not task.done()
            await asyncio.to_thread(redis_server.start)
            ids = {scored.rollout.rollout_id for _, scored in await rig.scored(20)}
        assert ids == {f"{10 + i}/0" for i in range(20)}
        stats = await rig.source.stats()
        assert (stats.dead, stats.depth, stats.balance) == (0, 0, 0)
