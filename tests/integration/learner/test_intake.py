"""What the learner takes from the stream, on a real redis-server: each rollout once, whatever happens to its delivery."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
from tests.integration.learner.harness import recorded
from tests.support.run import until

from honed.learner.episodes import Vocabulary
from honed.learner.intake import Held, Intake
from honed.queue.connection import Link
from honed.queue.dead import DeadLetters
from honed.queue.holding import holding
from honed.queue.keys import SCORED, RunKeys
from honed.queue.messages import Message
from honed.queue.stream import QueueSettings, WorkQueue
from honed.v1 import common_pb2

pytestmark = pytest.mark.redis

Open = Callable[..., AbstractAsyncContextManager[Intake]]


@pytest.fixture
def queue(link: Link, keys: RunKeys) -> Callable[..., WorkQueue]:
    def make(consumer: str) -> WorkQueue:
        return WorkQueue(link, keys, SCORED, consumer, QueueSettings(lease_ms=60_000, sweep_ms=1))

    return make


@pytest.fixture
def intake(queue: Callable[..., WorkQueue]) -> Open:
    @asynccontextmanager
    async def open_intake(consumer: str = "learner-1", staleness: int = 1) -> AsyncIterator[Intake]:
        mine = queue(consumer)
        async with holding(mine) as held, asyncio.timeout(30):
            yield Intake(mine, held, Vocabulary(258), max_staleness=staleness)

    return open_intake


@pytest.fixture
def expire(link: Link, keys: RunKeys) -> Callable[..., Awaitable[None]]:
    """Lets leases run out now, as while the process or Redis stood still."""

    async def expire(*held: Held) -> None:
        for each in held:
            d = each.delivery
            await link.redis.xclaim(keys.stream(SCORED), "workers", d.consumer, 0, [d.entry], idle=3_600_000, justid=True)

    return expire


def ids(held: list[Held]) -> list[str]:
    return [each.episode.rollout_id for each in held]


async def take_up(taking: Intake, count: int) -> None:
    """Has so many in hand, and waits for more in vain."""
    collecting = asyncio.ensure_future(taking.collect(99, 0))
    await until(lambda: len(taking._waiting) == count, 20, f"{count} rollouts in hand")
    collecting.cancel()
    await asyncio.wait([collecting])


def work(count: int, batch: int = 4) -> list[Message]:
    return list(recorded(count, batch))


def at_version(message: Message, step: int) -> Message:
    scored = common_pb2.ScoredRollout.FromString(message.body)
    scored.rollout.version_spans[0].version.step = step
    return Message(message.id, scored.SerializeToString())


async def test_batches_come_full_and_in_the_order_of_the_stream(queue: Callable[..., WorkQueue], intake: Open) -> None:
    messages = work(8)
    await queue("test").put(messages)
    async with intake() as taking:
        first, second = await taking.collect(4, 0), await taking.collect(4, 1)
    assert ids(first) + ids(second) == [message.id for message in messages]


async def test_staleness_is_checked_when_a_batch_is_made_not_when_its_rollouts_came(
    queue: Callable[..., WorkQueue], intake: Open
) -> None:
    messages = [at_version(message, 0) for message in work(2)] + [at_version(message, 2) for message in work(8)[2:]]
    await queue("test").put(messages)
    async with intake(staleness=1) as taking:
        await take_up(taking, len(messages))  # fresh as they all are at step 0
        batch = await taking.collect(4, 2)
        assert ids(batch) == [message.id for message in messages[2:6]]
        assert await taking.dropped() == {"stale": 2}


async def test_one_old_token_makes_a_rollout_as_old(queue: Callable[..., WorkQueue], intake: Open) -> None:
    message, fresh = work(2)
    scored = common_pb2.ScoredRollout.FromString(message.body)
    length = len(scored.rollout.response_token_ids)
    new = common_pb2.VersionSpan(version=common_pb2.PolicyVersion(run="small", fence=1, step=5), start=1, end=length)
    scored.rollout.version_spans[0].end = 1
    scored.rollout.version_spans.append(new)
    await queue("test").put([Message(message.id, scored.SerializeToString()), at_version(fresh, 5)])
    async with intake(staleness=1) as taking:
        assert ids(await taking.collect(1, 5)) == [fresh.id]
        assert await taking.dropped() == {"stale": 1}


async def test_what_cannot_be_read_is_a_dead_letter_with_the_reason(
    queue: Callable[..., WorkQueue], intake: Open, link: Link, keys: RunKeys
) -> None:
    broken, good = work(2)
    scored = common_pb2.ScoredRollout.FromString(broken.body)
    scored.rollout.logprobs[1] = float("nan")
    await queue("test").put([Message("junk", b"\xff\xff"), Message(broken.id, scored.SerializeToString()), good])
    async with intake() as taking:
        assert ids(await taking.collect(1, 0)) == [good.id]
        assert await taking.dropped() == {"dead_letter": 2}
    reasons = [letter.death.reason for letter in await DeadLetters(link, keys, SCORED).list()]
    assert "rollout.logprobs[1]" in reasons[1]


async def test_a_successor_trains_what_its_predecessors_held_and_acknowledges_what_had_trained(
    queue: Callable[..., WorkQueue], intake: Open
) -> None:
    messages = work(12)
    await queue("test").put(messages)
    async with intake("learner-1") as first:
        trained = await first.collect(4, 0)
    async with intake("learner-2") as second:
        await second.collect(4, 0)
    async with intake("learner-3") as third:  # the others' acknowledgements never arrived
        await third.take_over(["learner-1", "learner-2"], frozenset(ids(trained)))
        assert ids(await third.collect(8, 1)) == [message.id for message in messages[4:]]
        stats = await queue("test").stats()
        assert (stats.acked, stats.depth, stats.balance) == (4, 8, 0)


async def test_a_rollout_whose_lease_ran_out_while_it_waited_is_taken_up_once(
    queue: Callable[..., WorkQueue], intake: Open, expire: Callable[..., Awaitable[None]]
) -> None:
    messages = work(4)
    await queue("test").put(messages[:2])
    async with intake() as taking:
        await take_up(taking, 2)
        await expire(*taking._waiting)
        await queue("test").put(messages[2:])
        batch = await taking.collect(4, 0)
        assert ids(batch) == [message.id for message in messages]
        await taking.acknowledge(batch)
    stats = await queue("test").stats()
    assert (stats.acked, stats.depth, stats.balance) == (4, 0, 0)


async def test_a_rollout_whose_lease_ran_out_while_it_trained_does_not_train_again(
    queue: Callable[..., WorkQueue], intake: Open, expire: Callable[..., Awaitable[None]]
) -> None:
    messages = work(8)
    await queue("test").put(messages[:4])
    async with intake() as taking:
        first = await taking.collect(4, 0)
        await expire(*first)  # in a long update; then it comes again before the checkpoint is durable
        await queue("test").put(messages[4:])
        second = await taking.collect(4, 1)
        assert ids(first) + ids(second) == [message.id for message in messages]
        await taking.acknowledge([*first, *second])
    stats = await queue("test").stats()
    assert (stats.acked, stats.depth, stats.balance) == (8, 0, 0)


async def test_a_rollout_that_trained_and_comes_again_is_acknowledged_and_does_not_train(
    queue: Callable[..., WorkQueue], intake: Open
) -> None:
    """As after a crash of Redis that lost its last second: the checkpoint knows what the stream has forgotten."""
    messages = work(8)
    await queue("test").put(messages[:4])
    async with intake() as taking:
        await taking.acknowledge(await taking.collect(4, 0))
        await queue("test").put([*messages[:4], *messages[4:]])
        assert ids(await taking.collect(4, 1)) == [message.id for message in messages[4:]]
        stats = await queue("test").stats()
        assert (stats.acked, stats.dropped, stats.depth) == (8, {}, 4)


async def test_after_the_last_step_the_rest_is_dropped_and_counted(queue: Callable[..., WorkQueue], intake: Open) -> None:
    await queue("test").put(work(5))
    async with intake() as taking:
        assert await taking.discard("run_finished") == 5
        assert await taking.dropped() == {"run_finished": 5}


async def test_at_a_stop_what_waits_goes_back(queue: Callable[..., WorkQueue], intake: Open) -> None:
    messages = work(3)
    await queue("test").put(messages)
    async with intake("learner-1") as taking:
        await take_up(taking, 3)
        await taking.release()
    async with intake("learner-2") as successor:
        assert sorted(ids(await successor.collect(3, 0))) == [message.id for message in messages]


async def test_a_cancelled_wait_ends_whenever_the_cancellation_comes(queue: Callable[..., WorkQueue], intake: Open) -> None:
    async with intake() as taking:
        for turn in range(200):
            collecting = asyncio.ensure_future(taking.collect(999, 0))
            for _ in range(turn % 12):
                await asyncio.sleep(0)
            collecting.cancel()
            assert await asyncio.wait([collecting], timeout=5) == ({collecting}, set())
